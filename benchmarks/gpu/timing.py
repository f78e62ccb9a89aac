"""How long a call takes on a GPU, and what the card can do at best."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch


def time_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Median milliseconds of a call: replayed as a graph, without the host; else launch by launch."""
    if device.type != "cuda":  # the interpreter, to try a benchmark without a GPU
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    from triton.testing import do_bench, do_bench_cudagraph

    try:
        return float(do_bench_cudagraph(call, rep=50, return_mode="median"))
    except (RuntimeError, TypeError):  # it reads something back to the host
        torch.cuda.synchronize(device)
        return float(do_bench(call, warmup=25, rep=100, return_mode="median"))


def ceilings(device: torch.device) -> dict[str, float]:
    """Bytes per second of a copy (read and written), FLOP per second of a bfloat16 matrix product."""
    size = 1 << (31 if device.type == "cuda" else 20)
    memory = torch.randint(0, 255, (2, size), dtype=torch.uint8, device=device)
    copy = time_ms(partial(memory[0].copy_, memory[1]), device)
    n = 8192 if device.type == "cuda" else 128
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = time_ms(partial(torch.matmul, a, b), device)
    return {"copy_bytes_per_s": 2e3 * size / copy, "matmul_flop_per_s": 2e3 * n**3 / product}


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    import platform

    import triton

    facts = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "memory_gib": round(properties.total_memory / (1 << 30)),
            "processors": properties.multi_processor_count,
        }
    return facts
