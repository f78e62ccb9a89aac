"""What this card can do at best: memory, matrix products, launches. The other stages are held against it.

PYTHONPATH=src python benchmarks/gpu/ceilings.py --output ceilings.json
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ceiling_kernels import Empty, Reader
from stage import Results, stage_arguments
from timing import gpu_memory, time_ms

from halimede.kernels.target import num_processors

FILE = "ceilings.json"
_MOST_BYTES = 1 << 31
_ROUNDS, _LAUNCHES = 15, 300  # fewer than a driver queues without waiting


def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of torch's copy."""
    memory = gpu_memory(device)
    size = 1 << 20 if memory is None else min(_MOST_BYTES, memory // 8)
    source, target = (torch.randint(0, 255, (size,), dtype=torch.uint8, device=device) for _ in range(2))
    return 2e3 * size / time_ms(partial(target.copy_, source), device)


def read_rate(device: torch.device) -> float:
    """Bytes per second of a Triton kernel that only reads."""
    memory = gpu_memory(device)
    size, block = (1 << 16, 1 << 8) if memory is None else (min(_MOST_BYTES, memory // 8), 1 << 12)
    x = torch.randint(-9, 9, (size // 4,), dtype=torch.int32, device=device)
    read = Reader(x, num_processors(device), block)
    rate = 1e3 * read.num_bytes / time_ms(read, device)
    expected = x[: read.num_bytes // 4].sum().item()
    assert read.sums.sum().item() == expected, "the kernel that reads does not read all"
    return rate


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP per second of torch's matrix product of two squares."""
    n = 8192 if device.type == "cuda" else 64
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    call: Callable[[], Any] = partial(torch.matmul, a, b.t())
    if dtype.itemsize == 1:
        one = torch.ones((), device=device)
        call = partial(torch._scaled_mm, a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    return 2e3 * n**3 / time_ms(call, device)


def float8_type(device: torch.device) -> torch.dtype:
    """The 8-bit float that the card multiplies; some AMD GPUs have one of their own."""
    if device.type == "cuda" and torch.version.hip is not None:
        arch = torch.cuda.get_device_properties(device).gcnArchName
        return torch.float8_e4m3fnuz if arch.startswith("gfx94") else torch.float8_e4m3fn
    return torch.float8_e4m3fn


def host_us(start: Callable[[], Any], device: torch.device) -> float:
    """Microseconds of the CPU for one launch, median of rounds with an empty queue before each."""
    if device.type != "cuda":
        return time_ms(start, device) * 1e3
    start()
    rounds = []
    for _ in range(_ROUNDS):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(_LAUNCHES):
            start()
        rounds.append((time.perf_counter() - begin) / _LAUNCHES * 1e6)
    torch.cuda.synchronize(device)
    return statistics.median(rounds)


def load_ceilings(folder: Path, device: torch.device) -> dict[str, Any]:
    """What this stage has written in `folder`; without it the two figures that every other stage needs."""
    try:
        found: dict[str, Any] = json.loads((folder / FILE).read_text())
    except (OSError, ValueError):
        found = {}
    if not {"copy_bytes_per_s", "bfloat16_flop_per_s"} <= found.keys():
        found["copy_bytes_per_s"] = copy_rate(device)
        found["bfloat16_flop_per_s"] = product_rate(torch.bfloat16, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # an engine that is measured next sizes its KV cache by what is free
    return found


def measure(results: Results, device: torch.device) -> None:
    with results.attempt("copy"):
        results.put("copy_bytes_per_s", copy_rate(device))
    with results.attempt("read"):
        results.put("read_bytes_per_s", read_rate(device))
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        with results.attempt(f"product in {name}"):
            results.put(f"{name}_flop_per_s", product_rate(dtype, device))
    try:
        results.put("float8_flop_per_s", product_rate(float8_type(device), device))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        results.note(f"no product in float8 here: {str(error).splitlines()[0][:200]}")
    empty = Empty(device)
    with results.attempt("launch floor"):
        results.put("launch_floor_us", time_ms(empty.by_variant, device) * 1e3)
    ways: dict[str, Callable[[], Any]] = {"Variant.start": empty.by_variant, "launch": empty.by_launch}
    ways["torch's add_"] = partial(torch.ones(128, device=device).add_, 1)
    times: dict[str, float] = {}
    for name, way in ways.items():
        with results.attempt(f"host time of {name}"):
            times[name] = host_us(way, device)
            results.put("host_launch_us", times)
    try:  # its driver needs a GPU and a C compiler
        times["Triton's kernel[grid]"] = host_us(empty.by_triton, device)
        results.put("host_launch_us", times)
    except Exception as error:
        results.note(f"Triton's own launch is left out: {type(error).__name__}: {str(error)[:200]}")


def summary(found: dict[str, Any]) -> str:
    rates = {"copy": "copy_bytes_per_s", "read": "read_bytes_per_s"}
    lines = [f"{name} {found[key] / 1e12:.3f} TB/s" for name, key in rates.items() if key in found]
    types = ("bfloat16", "float16", "float8")
    lines += [
        f"{t} {found[f'{t}_flop_per_s'] / 1e12:.0f} TFLOP/s" for t in types if f"{t}_flop_per_s" in found
    ]
    if "launch_floor_us" in found:
        lines.append(f"{found['launch_floor_us']:.2f} us a node of a graph")
    lines += [f"{name} {us:.1f} us of the host" for name, us in found.get("host_launch_us", {}).items()]
    return "; ".join(lines)


def main() -> int:
    options = stage_arguments(__doc__).parse_args()
    device = torch.device(options.device)
    results = Results(options.output, device)
    with torch.inference_mode():
        measure(results, device)
    print(summary(results.data))
    return results.status


if __name__ == "__main__":
    raise SystemExit(main())
