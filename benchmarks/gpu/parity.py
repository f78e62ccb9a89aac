"""Every case of every kernel on this machine's GPU against its reference: prints what differs.

PYTHONPATH=src:tests:tests/kernels python benchmarks/gpu/parity.py --output parity.json

Inputs are random, and what a kernel does not write holds NaN.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from kernel_parity import check_case
from kernels_ahead import build_for_calls
from stage import Results, stage_arguments

from halimede.kernels.spec import Case, KernelSpec, all_kernels


def selected(only: str) -> Iterator[tuple[KernelSpec, Case]]:
    """Cases of the kernels whose name has one of the words of `only` in it."""
    words = only.split(",")
    for spec in all_kernels().values():
        if any(word in spec.name for word in words):
            yield from ((spec, case) for case in spec.cases)


def launches(spec: KernelSpec, case: Case) -> Callable[[], Any]:
    return lambda: spec.launcher(**case.make(torch.device("cpu")))


def main() -> int:
    parser = stage_arguments(__doc__)
    parser.add_argument("--only", default="", help="kernels whose name has one of these words in it")
    options = parser.parse_args()
    device = torch.device(options.device)
    results = Results(options.output, device)
    chosen = list(selected(options.only))
    with results.attempt("compiling ahead"):
        build_for_calls((launches(spec, case) for spec, case in chosen), device)
    failed = 0
    for spec, case in chosen:
        start, error = time.perf_counter(), None
        try:
            check_case(spec, case, device=options.device)
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
            failed += 1
            results.fail(f"{spec.name} ({case.name})", error)
        seconds = round(time.perf_counter() - start, 3)
        results.add(
            "rows", {"kernel": spec.name, "case": case.name, "seconds": seconds, "equal": error is None}
        )
    print(f"parity: {len(chosen) - failed} of {len(chosen)} cases equal their reference")
    return results.status


if __name__ == "__main__":
    raise SystemExit(main())
