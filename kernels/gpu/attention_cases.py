"""Inputs of the attention kernels: ragged rows over shuffled blocks, poison where nothing may be read."""

from collections.abc import Sequence
from typing import Any

import torch

Row = tuple[int, int]
"""Query tokens of a row, and the tokens of its sequence with them."""


def make_step(
    device: torch.device,
    rows: Sequence[Row],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    scale_per_token: bool = False,
    sinks: bool = False,
) -> dict[str, Any]:
    """q, caches, tables and lengths of a step, as keyword arguments of paged_attention_reference.

    q (T, H, D) is a slice of a fused projection. Blocks are shuffled; unused slots and blocks are NaN where
    the cache's dtype has one, large values otherwise. cache_dtype float8_e4m3fn or int8 adds k_scale and
    v_scale, (1) or, scale_per_token, [N, K, B].
    """
    cache_dtype = cache_dtype or dtype
    counts, lengths = [count for count, _ in rows], [length for _, length in rows]
    needed = [-(-length // block_size) for length in lengths]
    width, num_blocks = max(needed, default=0) + 2, sum(needed) + 3
    starts = torch.zeros(len(rows) + 1, dtype=torch.int32, device=device)
    starts[1:] = _integers(counts, device).cumsum(0)
    order = torch.randperm(num_blocks - 1, device=device).int() + 1
    tables = torch.zeros(len(rows), width, dtype=torch.int32, device=device)
    for row, count in enumerate(needed):
        first = sum(needed[:row])
        tables[row, :count] = order[first : first + count]
    q = torch.randn(sum(counts), heads + 2 * kv_heads, head_dim, device=device).to(dtype)[:, :heads]
    step = {
        "q": q,
        "block_tables": tables,
        "query_start_loc": starts,
        "seq_lens": _integers(lengths, device),
        "scale": head_dim**-0.5,
    }
    shape = (num_blocks, kv_heads, block_size, head_dim)
    used = None if device.type != "cpu" else _used_slots(tables, lengths, num_blocks, block_size)
    for name in ("k", "v"):
        cache, scale = _make_cache(shape, cache_dtype, scale_per_token, used, device)
        step[f"{name}_cache"] = cache
        if scale is not None:
            step[f"{name}_scale"] = scale
    if sinks:
        step["sinks"] = torch.randn(heads, device=device)
    return step


def _integers(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cpu").to(device)


def _used_slots(tables: torch.Tensor, lengths: list[int], num_blocks: int, block_size: int) -> torch.Tensor:
    """(N, B) bool: which slots hold a token."""
    used = torch.zeros(num_blocks, block_size, dtype=torch.bool, device=tables.device)
    for table, length in zip(tables, lengths, strict=True):
        positions = torch.arange(length, device=tables.device)
        used[table[positions // block_size].long(), positions % block_size] = True
    return used


def _make_cache(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    scale_per_token: bool,
    used: torch.Tensor | None,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One cache and its scale; used: the slots that are not poisoned, None for all."""
    values = torch.randn(shape, device=device)
    scale = None
    if dtype.itemsize == 1:
        scale_shape = shape[:3] if scale_per_token else (1,)
        scale = (0.5 + torch.rand(scale_shape, device=device)) / 32
        values = (values * 32).clamp(-120, 120)
        values = values.round() if dtype == torch.int8 else values
    if used is not None:
        unused = ~used[:, None, :, None].expand(shape)
        values = values.masked_fill(unused, 127.0 if dtype == torch.int8 else torch.nan)
        if scale is not None and scale_per_token:
            scale = scale.masked_fill(unused[..., 0], torch.nan)
    return values.to(dtype), scale


ROWS: dict[str, tuple[Row, ...]] = {
    "one token": ((1, 1),),
    "decode": ((1, 1), (1, 16), (1, 17), (1, 75), (1, 3)),
    "one prompt": ((37, 37),),
    "prompts": ((5, 5), (16, 16), (33, 33), (2, 2)),
    "chunks with context": ((7, 40), (16, 32), (2, 17), (20, 21)),
    "mixed": ((1, 9), (11, 11), (1, 50), (6, 30), (1, 1), (3, 3)),
    "rows without tokens": ((0, 4), (1, 9), (0, 0), (4, 8)),
    "no tokens": ((0, 5),),
    "no rows": (),
}
"""Steps of every kind, with odd lengths."""
