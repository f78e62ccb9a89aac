"""What this machine reaches by itself, and whether it is quiet: so numbers of two machines or days compare.

python benchmarks/machine.py        prints one JSON object
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SPREAD = 0.15
BUSY_LOAD = 0.5


def calibrate(threads: int, seconds: float = 3.0) -> dict[str, Any]:
    """measure() in a process of its own, so that the caller's stays without torch and its threads."""
    command = [sys.executable, str(Path(__file__)), "--seconds", str(seconds)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(seconds: float) -> dict[str, Any]:
    """Load average; medians of memory read bandwidth, matrix products in two types, and a loop in Python."""
    import torch

    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    big = torch.ones(64 << 20)  # 256 MiB: no cache holds it
    # As many rows as a prefill runs, and the shape of a small model's projection.
    left, right = torch.randn(512, 1024), torch.randn(1024, 2048)
    left_bf16, right_bf16 = left.bfloat16(), right.bfloat16()
    flop = 2 * 512 * 1024 * 2048
    share = seconds / 4
    return {
        "load_average_1min": load_average,
        "threads": torch.get_num_threads(),
        "read_gb_per_s": big.nbytes / _median_time(big.sum, share) / 1e9,
        "bf16_matmul_gflop_per_s": flop / _median_time(lambda: left_bf16 @ right_bf16, share) / 1e9,
        "fp32_matmul_gflop_per_s": flop / _median_time(lambda: left @ right, share) / 1e9,
        "python_loop_ms": 1e3 * _median_time(lambda: sum(range(200_000)), share),
    }


def _median_time(work: Callable[[], object], seconds: float) -> float:
    work()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def doubts(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Why the run in between is not to be trusted; empty when the machine was quiet."""
    found = []
    load = before["load_average_1min"]
    if load is not None and load > BUSY_LOAD:
        found.append(f"the load average was {load:.2f} before the run: other programs were at work")
    for name in ("read_gb_per_s", "bf16_matmul_gflop_per_s", "fp32_matmul_gflop_per_s", "python_loop_ms"):
        if abs(after[name] / before[name] - 1) > SPREAD:
            found.append(f"{name} was {before[name]:.3g} before the run and {after[name]:.3g} after it")
    return found


def main() -> None:
    """Print measure()."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="time for the measurements (default: 3)")
    print(json.dumps(measure(parser.parse_args().seconds), indent=1))


if __name__ == "__main__":
    main()
