"""Times the kernels on this GPU beside what the card can do, and beside torch and xformers.

PYTHONPATH=src python benchmarks/gpu/kernel_timings.py --output kernels.json
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from attention_timings import attention_launches, time_decode, time_prefill
from bench import Bench
from ceilings import load_ceilings
from graph_rounds import little_garbage
from kernels_ahead import build_for_calls
from layer_timings import layer_launches, time_gated_matmul, time_layers, time_products
from stage import Results, stage_arguments

from halimede.kernels.spec import Case, KernelSpec, all_kernels

_BY_SHAPE = ("attention_decode", "attention_prefill")  # timed at shapes of their own
_REHEARSED = ("copy_blocks", "embed")


def signatures(*, rehearsed: bool) -> Iterator[tuple[KernelSpec, Case]]:
    """Of every other kernel, with the shapes that it is compiled for."""
    for spec in all_kernels().values():
        if spec.name in _BY_SHAPE or (rehearsed and spec.name not in _REHEARSED):
            continue
        yield from ((spec, case) for case in (spec.cases[:1] if rehearsed else spec.signatures))


def signature_launches() -> Iterator[Callable[[], Any]]:
    for spec, case in signatures(rehearsed=False):
        yield partial(_launch_on_meta, spec, case)


def _launch_on_meta(spec: KernelSpec, case: Case) -> None:
    spec.launcher(**case.make(torch.device("meta")))


def time_signatures(bench: Bench) -> None:
    for spec, case in signatures(rehearsed=bench.rehearsed):
        with bench.results.attempt(f"{spec.name} ({case.name})"):
            torch.manual_seed(0)
            arguments, work = case.make(bench.device), case.work
            call = partial(spec.launcher, **arguments)
            bench.add(
                spec.name, case.name, call, bytes=work.bytes if work else 0, flops=work.flops if work else 0
            )


def main() -> int:
    options = stage_arguments(__doc__).parse_args()
    device = torch.device(options.device)
    results = Results(options.output, device)
    with torch.inference_mode():
        best = load_ceilings(options.output.parent, device)
        results.put("ceilings", best)
        bench = Bench(device, results, best)
        with results.attempt("compiling ahead"):
            build_for_calls((*attention_launches(), *layer_launches(), *signature_launches()), device)
        parts = (
            time_products,
            time_decode,
            time_prefill,
            time_layers,
            time_gated_matmul,
            time_signatures,
        )
        with little_garbage():
            for part in parts:
                with results.attempt(part.__name__):
                    part(bench)
    return results.status


if __name__ == "__main__":
    raise SystemExit(main())
