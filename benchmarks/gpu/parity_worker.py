"""Runs cases of kernels on a GPU in a process of its own, so that one it dies of costs nobody else his turn.

PYTHONPATH=src:tests:tests/kernels python benchmarks/gpu/parity_worker.py --device cuda --only WORDS

Standard input has the number of a case in each line; each is answered with a line of JSON: {"error": None or
what was wrong, "seconds", "alive": whether the GPU still answers}. The first line says that all is imported.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

# Before CUDA is used: with it cuBLAS is deterministic, which torch demands where unwritten memory holds NaN.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from kernel_parity import check_case
from stage import gpu_answers

from halimede.kernels.spec import Case, KernelSpec, all_kernels


def selected(only: str) -> Iterator[tuple[KernelSpec, Case]]:
    """Cases of the kernels whose name has one of the words of `only` in it."""
    words = only.split(",")
    for spec in all_kernels().values():
        if any(word in spec.name for word in words):
            yield from ((spec, case) for case in spec.cases)


def launches(spec: KernelSpec, case: Case) -> Callable[[], Any]:
    return lambda: spec.launcher(**case.make(torch.device("cpu")))


def check(spec: KernelSpec, case: Case, device: torch.device) -> dict[str, Any]:
    start, error = time.perf_counter(), None
    try:
        check_case(spec, case, device=str(device))
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"
    alive = gpu_answers(device)
    if error is None and not alive:
        error = "the GPU does not answer after it"
    return {"error": error, "seconds": round(time.perf_counter() - start, 3), "alive": alive}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    # What compilers and torch print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    chosen, device = list(selected(options.only)), torch.device(options.device)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    say({"ready": True})
    for line in sys.stdin:
        say(check(*chosen[int(line)], device))


if __name__ == "__main__":
    main()
