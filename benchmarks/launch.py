"""What starting a kernel costs the CPU: Triton's ways beside Halimede's, on a GPU driver that only pretends.

The driver's function returns at once, so on a real GPU its own time comes on top of every row.
Needs a C compiler, for the pretended driver and for Triton's own, but no GPU. Prints a table.

    .venv/bin/python benchmarks/launch.py
    PYTHONPATH=.venv/triton-3.6 .venv/bin/python benchmarks/launch.py
"""

import argparse
import ctypes
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from halimede.kernels.gpu_driver import cuda_driver
from halimede.kernels.launch_plan import LaunchPlan

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "kernels"))

from stub_gpu import build_stub
from stub_gpu.real_driver import STREAM, use_real_driver
from stub_gpu.sample_kernels import many_arguments

NUM_TENSORS, NUM_SCALARS = 8, 11
BLOCK = 128
GRID = (132, 1, 1)
OPTIONS = {"BLOCK": BLOCK, "enable_fp_fusion": True}


def measured_ways(library: Path) -> dict[str, Callable[[], object]]:
    """Each way to launch the same kernel, by its name in the table."""
    kernel = many_arguments
    tensors = [torch.zeros(BLOCK) for _ in range(NUM_TENSORS)]
    scalars = list(range(3, 3 + NUM_SCALARS))
    args, values = (*tensors, *scalars), (*(t.data_ptr() for t in tensors), *scalars)

    compiled = kernel[GRID](*args, **OPTIONS)
    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata

    driver = cuda_driver(str(library))
    ours = driver.load(compiled.kernel, compiled.name, compiled.metadata.shared, 0)
    types = [kind for kind in compiled.src.signature.values() if kind != "constexpr"]
    threads = compiled.metadata.num_warps * 32
    plan = LaunchPlan(driver, ours, name=kernel.__name__, types=types, threads=threads, shared_memory=0)
    launch = plan.launch

    def from_tensors() -> None:
        launch(GRID, STREAM, [*[tensor.data_ptr() for tensor in tensors], *scalars])

    # In one tuple each, so that joining them is not counted.
    head = (*GRID, STREAM, function, packed, None, None, None)
    with_tensors, with_addresses = (*head, *args, BLOCK), (*head, *values, BLOCK)
    return {
        "Triton: kernel[grid](tensors, numbers)": lambda: kernel[GRID](*args, **OPTIONS),
        "Triton: CompiledKernel.run, tensors": lambda: run(*with_tensors),
        "Triton: CompiledKernel.run, addresses": lambda: run(*with_addresses),
        "LaunchPlan.launch, tensors": from_tensors,
        "LaunchPlan(), addresses": lambda: plan(GRID, STREAM, values),
        "LaunchPlan.launch, addresses": lambda: launch(GRID, STREAM, values),
        **_bare_calls(driver.launch_function, library, ours, threads),
    }


def _bare_calls(untyped: Any, library: Path, function: int, threads: int) -> dict[str, Callable[[], object]]:
    """The driver's function alone, with ctypes' parameter objects and with declared types."""
    memory = (ctypes.c_uint64 * 32)()
    pointers = (ctypes.c_void_p * 32)(*[ctypes.addressof(memory)] * 32)
    declared = ctypes.CDLL(str(library))["cuLaunchKernel"]
    declared.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]
    handle, stream = ctypes.c_void_p.from_param(function), ctypes.c_void_p.from_param(STREAM)
    start = ctypes.byref(pointers)
    x, y, z = GRID
    return {
        "  cuLaunchKernel alone, as the plan calls it": lambda: untyped(
            handle, x, y, z, threads, 1, 1, 0, stream, start, None
        ),
        "  cuLaunchKernel alone, argument types declared": lambda: declared(
            function, x, y, z, threads, 1, 1, 0, STREAM, pointers, None
        ),
    }


def time_in_turns(ways: dict[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Microseconds for one call of each, in each round; every round measures all, one after another."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    turns = range(repeats)
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter_ns()
            for _ in turns:
                way()
            times[name].append((time.perf_counter_ns() - start) / repeats / 1000)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="Microseconds that a launch costs the CPU.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=5000, help="launches of each way in each round")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = f"{folder}/cache"
        library = build_stub("cuda", Path(folder))
        use_real_driver("cuda", library)
        times = time_in_turns(measured_ways(library), arguments.rounds, arguments.repeats)
    print(
        f"triton {triton.__version__}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"{NUM_TENSORS} pointers and {NUM_SCALARS} numbers; {arguments.rounds} rounds"
    )
    print("\n| µs a launch | median | least |\n| --- | --- | --- |")
    for name, found in times.items():
        print(f"| {name} | {statistics.median(found):.2f} | {min(found):.2f} |")


if __name__ == "__main__":
    main()
