"""Times the kernels on this GPU beside what the card can do, and attention beside torch and xformers.

PYTHONPATH=src python benchmarks/gpu/kernels.py --output kernels.json
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import ceilings, describe, time_ms

from halimede.engine.layers.attention_gpu import PagedAttention, PagedRows, TritonAttention
from halimede.engine.model_input import KVCache
from halimede.kernels.gpu.attention_cases import make_step
from halimede.kernels.spec import all_kernels

# Llama-3-8B's attention.
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DECODE = ((1, 1024), (1, 8192), (8, 8192), (32, 1024), (32, 8192), (128, 1024), (256, 1024), (4, 32768))
PREFILL = (((4096, 4096),), ((8192, 8192),), ((1024, 1024),) * 8, ((2048, 8192),) * 2)
SMOKE_DECODE = ((2, 40),)
SMOKE_PREFILL = (((20, 40),),)


@dataclass(frozen=True)
class Timing:
    """One call: its bytes and FLOPs are the least it could move and do."""

    group: str
    name: str
    ms: float
    bytes: int
    flops: int


class Bench:
    def __init__(self, device: torch.device, output: Path, report: dict[str, Any]) -> None:
        self.device, self.output, self.report = device, output, report

    def add(self, group: str, name: str, call: Callable[[], Any], *, bytes: int, flops: int = 0) -> None:
        """Time a call; what fails is reported and leaves the others alone."""
        try:
            timing = asdict(Timing(group, name, time_ms(call, self.device), bytes, flops))
        except Exception as problem:
            timing = {"group": group, "name": name, "error": f"{type(problem).__name__}: {problem}"[:500]}
        self.report["timings"].append(timing)
        self.output.write_text(json.dumps(self.report, indent=1))
        print(line_of(timing, self.report["ceilings"]), flush=True)


def line_of(timing: dict[str, Any], best: dict[str, float]) -> str:
    """A timing beside the card's copy and matrix product."""
    head = f"{timing['group']:<30}{timing['name']:<48}"
    if "error" in timing:
        return f"{head} failed: {timing['error'].splitlines()[0][:80]}"
    seconds = timing["ms"] / 1e3
    rate, speed = timing["bytes"] / seconds, timing["flops"] / seconds
    of_copy, of_product = rate / best["copy_bytes_per_s"], speed / best["matmul_flop_per_s"]
    return (
        f"{head}{timing['ms'] * 1e3:>10.1f} us {rate / 1e9:>8.0f} GB/s ({of_copy:>4.0%})"
        f" {speed / 1e12:>7.1f} TFLOP/s ({of_product:>4.0%})"
    )


def prepared(attention: PagedAttention, step: dict[str, Any]) -> Callable[[], torch.Tensor]:
    counts = step["query_start_loc"].diff().tolist()
    rows = PagedRows(
        step["block_tables"],
        step["query_start_loc"],
        step["seq_lens"],
        max(counts),
        max(step["seq_lens"].tolist()),
        counts.count(1),
    )
    cache = KVCache(step["k_cache"], step["v_cache"], step.get("k_scale"), step.get("v_scale"))
    attend = attention.prepare(rows, cache, HEADS, None)
    return lambda: attend(step["q"], cache, step["scale"])


def others() -> Iterator[tuple[str, PagedAttention]]:
    try:
        from halimede.engine.layers.attention_xformers import XformersAttention

        yield "xformers", XformersAttention()
    except (ImportError, OSError, RuntimeError) as problem:
        print(f"xformers is left out: {problem}")


def bench_decode(bench: Bench, smoke: bool) -> None:
    caches = ((None, False), (torch.float8_e4m3fn, False), (torch.int8, True))
    for rows, context in SMOKE_DECODE if smoke else DECODE:
        for block_size in (16, 64) if smoke else (16, 32, 64, 128):
            for cache_dtype, per_token in caches if block_size == 64 else caches[:1]:
                step = make_step(
                    bench.device,
                    [(1, context)] * rows,
                    heads=HEADS,
                    kv_heads=KV_HEADS,
                    head_dim=HEAD_DIM,
                    block_size=block_size,
                    cache_dtype=cache_dtype,
                    scale_per_token=per_token,
                )
                size = (cache_dtype or torch.bfloat16).itemsize
                work = {
                    "bytes": 2 * rows * context * KV_HEADS * HEAD_DIM * size,
                    "flops": 4 * rows * context * HEADS * HEAD_DIM,
                }
                kind = str(cache_dtype or torch.bfloat16).removeprefix("torch.")
                name = f"{rows} x {context}, blocks of {block_size}, {kind}"
                bench.add("decode", name, prepared(TritonAttention(131072), step), **work)
                if cache_dtype is None and block_size == 64 and bench.device.type == "cuda":
                    for other, attention in others():
                        bench.add("decode", f"{name}: {other}", prepared(attention, step), **work)


def bench_prefill(bench: Bench, smoke: bool) -> None:
    for rows in SMOKE_PREFILL if smoke else PREFILL:
        step = make_step(bench.device, rows, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, block_size=64)
        pairs = sum(count * length - count * (count - 1) // 2 for count, length in rows)
        work = {"bytes": 2 * step["q"].numel() * 2, "flops": 4 * pairs * HEADS * HEAD_DIM}
        name = f"{len(rows)} x {rows[0][0]} of {rows[0][1]}"
        bench.add("prefill", name, prepared(TritonAttention(131072), step), **work)
        if bench.device.type != "cuda":
            continue
        for other, attention in others():
            bench.add("prefill", f"{name}: {other}", prepared(attention, step), **work)
        if all(count == length for count, length in rows):
            bench.add("prefill", f"{name}: torch flash", flash(len(rows), rows[0][0], bench.device), **work)


def flash(batch: int, length: int, device: torch.device) -> Callable[[], torch.Tensor]:
    """torch's flash attention on plain tensors: what ours must come up to, though it has pages."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.randn(batch, HEADS, length, HEAD_DIM, device=device, dtype=torch.bfloat16)
    k, v = (
        torch.randn(batch, KV_HEADS, length, HEAD_DIM, device=device, dtype=torch.bfloat16) for _ in range(2)
    )

    def call() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return call


def bench_signatures(bench: Bench, smoke: bool) -> None:
    """Every signature of every other kernel, with the shapes that it is compiled for."""
    for spec in all_kernels().values():
        if spec.name in ("attention_decode", "attention_prefill"):
            continue
        for case in spec.cases[:1] if smoke else spec.signatures:
            torch.manual_seed(0)
            arguments, work = case.make(bench.device), case.work
            bench.add(
                spec.name,
                case.name,
                partial(spec.launcher, **arguments),
                bytes=work.bytes if work else 0,
                flops=work.flops if work else 0,
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to see that it runs")
    options = parser.parse_args()
    device = torch.device(options.device)
    report = {"machine": describe(device), "ceilings": ceilings(device), "timings": []}
    print(
        f"copy {report['ceilings']['copy_bytes_per_s'] / 1e12:.2f} TB/s, "
        f"bfloat16 product {report['ceilings']['matmul_flop_per_s'] / 1e12:.0f} TFLOP/s"
    )
    bench = Bench(device, options.output, report)
    with torch.inference_mode():
        for run in (bench_decode, bench_prefill, bench_signatures):
            run(bench, options.smoke)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
