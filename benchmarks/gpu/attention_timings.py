"""Attention at Llama-3-8B's shape: ours, xformers' and torch's, at the contexts of serving."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from bench import Bench, in_turn

from halimede.engine.layers.attention_gpu import PagedAttention, PagedRows
from halimede.engine.model_input import KVCache
from halimede.kernels.gpu.attention_cases import make_step
from halimede.kernels.gpu.attention_decode import paged_attention_decode
from halimede.kernels.gpu.attention_decode_plan import default_split_size, plan_decode
from halimede.kernels.gpu.attention_prefill import paged_attention_prefill

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
MAX_MODEL_LEN = 32768
# Rows, and tokens of each.
DECODE = (
    (1, 1024),
    (1, 8192),
    (1, 32768),
    (8, 1024),
    (8, 8192),
    (32, 1024),
    (32, 8192),
    (256, 1024),
    (4, 32768),
)
# Rows, each with its new tokens and those of its sequence.
PREFILL = (
    ((1024, 1024),) * 8,
    ((8192, 8192),),
    ((2048, 8192),) * 2,
    ((2048, 32768),),
)
REHEARSED_DECODE = ((2, 20),)
REHEARSED_PREFILL = (((6, 20),),)
BLOCK_SIZES = (16, 64)
COMPARED_BLOCK_SIZE = 64  # smaller ones make xformers gather
NARROW = ((torch.float8_e4m3fn, False), (torch.int8, True))

Call = Callable[[], Any]


def prepared(attention: PagedAttention, step: dict[str, Any]) -> Call:
    """Another library's attention as the engine calls it."""
    counts, lengths = step["query_start_loc"].diff().tolist(), step["seq_lens"].tolist()
    rows = PagedRows(
        step["block_tables"],
        step["query_start_loc"],
        step["seq_lens"],
        max(counts),
        max(lengths),
        counts.count(1),
    )
    kv_cache = KVCache(step["k_cache"], step["v_cache"], step.get("k_scale"), step.get("v_scale"))
    attend = attention.prepare(rows, kv_cache, HEADS, None)
    return lambda: attend(step["q"], kv_cache, step["scale"])


def ours(step: dict[str, Any]) -> Call:
    """Our kernel for a step whose rows all decode or are all prefilled."""
    q, starts, lengths = step["q"], step["query_start_loc"], step["seq_lens"]
    inputs = (q, step["k_cache"], step["v_cache"], step["block_tables"], starts, lengths)
    rest = {"scale": step["scale"], "k_scale": step.get("k_scale"), "v_scale": step.get("v_scale")}
    if len(q) > len(lengths):
        return lambda: paged_attention_prefill(*inputs, torch.empty_like(q), sliding_window=None, **rest)
    plan = plan_decode(
        starts,
        lengths,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_seq_len=int(lengths.max()),
        sliding_window=None,
        split_size=default_split_size(MAX_MODEL_LEN),
    )
    return lambda: paged_attention_decode(*inputs, plan, torch.empty_like(q), sliding_window=None, **rest)


@cache
def others() -> dict[str, PagedAttention]:
    try:
        from halimede.engine.layers.attention_xformers import XformersAttention

        return {"xformers": XformersAttention()}
    except (ImportError, OSError, RuntimeError) as problem:
        print(f"xformers is left out: {problem}")
        return {}


def step_of(device: torch.device, rows: Any, block_size: int, **cache: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "block_size": block_size,
    }
    return make_step(device, rows, **sizes, **cache)


def attention_launches() -> Iterator[Call]:
    """Calls with few tokens, of every kind that is timed."""
    for block_size in BLOCK_SIZES:
        for rows in (1, 8, 32, 256):
            yield partial(_launch_small, [(1, 9)] * rows, block_size)
    for dtype, per_token in NARROW:
        narrow = {"cache_dtype": dtype, "scale_per_token": per_token}
        yield partial(_launch_small, [(1, 9)], COMPARED_BLOCK_SIZE, **narrow)
    for rows in {len(rows) for rows in PREFILL}:
        yield partial(_launch_small, [(2, 9)] * rows, COMPARED_BLOCK_SIZE)


def _launch_small(rows: Any, block_size: int, **cache: Any) -> None:
    ours(step_of(torch.device("cpu"), rows, block_size, **cache))()


def time_decode(bench: Bench) -> None:
    for rows, context in REHEARSED_DECODE if bench.rehearsed else DECODE:
        for block_size in BLOCK_SIZES[:1] if bench.rehearsed else BLOCK_SIZES:
            compared = block_size == COMPARED_BLOCK_SIZE
            for cache_dtype, per_token in ((None, False), *(NARROW if compared else ())):
                what = f"decode {rows} x {context}, blocks of {block_size}, {cache_dtype}"
                with bench.results.attempt(what):
                    _time_decode(bench, rows, context, block_size, cache_dtype, per_token)


def _time_decode(
    bench: Bench, rows: int, context: int, block_size: int, cache_dtype: torch.dtype | None, per_token: bool
) -> None:
    kept = cache_dtype or torch.bfloat16
    work = {
        "bytes": 2 * rows * context * KV_HEADS * HEAD_DIM * kept.itemsize,
        "flops": 4 * rows * context * HEADS * HEAD_DIM,
    }
    copies = bench.copies(work["bytes"])
    steps = [
        step_of(
            bench.device,
            [(1, context)] * rows,
            block_size,
            cache_dtype=cache_dtype,
            scale_per_token=per_token,
        )
        for _ in range(copies)
    ]
    name = f"{rows} x {context}, blocks of {block_size}, {str(kept).removeprefix('torch.')}"

    bench.add("decode", name, in_turn([ours(step) for step in steps]), repeats=copies, **work)
    if cache_dtype is None and block_size == COMPARED_BLOCK_SIZE and not bench.rehearsed:
        for other, attention in others().items():
            call = in_turn([prepared(attention, step) for step in steps])
            bench.add("decode", f"{name}: {other}", call, repeats=copies, **work)
        call = in_turn([plain_attention(rows, 1, context, bench.device) for _ in range(copies)])
        bench.add("decode", f"{name}: torch without pages", call, repeats=copies, **work)


def time_prefill(bench: Bench) -> None:
    for rows in REHEARSED_PREFILL if bench.rehearsed else PREFILL:
        name = f"{len(rows)} x {rows[0][0]} of {rows[0][1]}"
        with bench.results.attempt(f"prefill {name}"):
            _time_prefill(bench, rows, name)


def _time_prefill(bench: Bench, rows: Any, name: str) -> None:
    step = step_of(bench.device, rows, COMPARED_BLOCK_SIZE)
    pairs = sum(count * length - count * (count - 1) // 2 for count, length in rows)
    work = {"bytes": 2 * step["q"].numel() * 2, "flops": 4 * pairs * HEADS * HEAD_DIM}
    bench.add("prefill", name, ours(step), **work)
    if bench.rehearsed:
        return
    for other, attention in others().items():
        bench.add("prefill", f"{name}: {other}", prepared(attention, step), **work)
    if all(count == length for count, length in rows):
        call = plain_attention(len(rows), rows[0][0], rows[0][0], bench.device)
        bench.add("prefill", f"{name}: torch without pages", call, **work)


def plain_attention(batch: int, count: int, length: int, device: torch.device) -> Call:
    """torch's attention on tensors that lie as it likes: what ours must come up to, though it has pages."""
    shapes = ((HEADS, count), (KV_HEADS, length), (KV_HEADS, length))
    q, k, v = (
        torch.randn(batch, heads, tokens, HEAD_DIM, device=device, dtype=torch.bfloat16)
        for heads, tokens in shapes
    )
    return partial(F.scaled_dot_product_attention, q, k, v, is_causal=count > 1, enable_gqa=True)
