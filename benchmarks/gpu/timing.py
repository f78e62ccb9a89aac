"""How long a call takes on a GPU, and on what machine."""

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

_GRAPH_MS = 10  # of calls in a graph, which is then replayed ten times
_SINGLE_CALLS = 20


def time_ms(call: Callable[[], Any], device: torch.device, *, repeats: int = 1) -> float:
    """Median milliseconds of a call: replayed as a graph, without the host; else launch by launch.

    repeats: how often the call does what is timed.
    """
    if device.type != "cuda":  # the interpreter, to try a benchmark without a GPU
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3 / repeats
    from triton.testing import do_bench_cudagraph

    try:
        return float(do_bench_cudagraph(call, rep=_GRAPH_MS, return_mode="median")) / repeats
    except (RuntimeError, TypeError):  # it reads something back to the host
        torch.cuda.synchronize(device)
        return _single_ms(call) / repeats


def _single_ms(call: Callable[[], Any]) -> float:
    """Between two events, the host's time included. Triton's do_bench would need a C compiler."""
    times = []
    for _ in range(_SINGLE_CALLS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return float(statistics.median(times))


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    import triton

    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "memory_gib": round(properties.total_memory / (1 << 30)),
            "processors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    return facts


def gpu_memory(device: torch.device) -> int | None:
    """Bytes in all; None without a GPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
