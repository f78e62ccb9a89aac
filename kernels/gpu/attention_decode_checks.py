"""What decode attention takes: each check raises KernelError with what was given.

Layouts are given in place of tensors that are the same at every launch: what a variant is found by.
"""

import torch

from halimede.errors import KernelError
from halimede.kernels.variant_key import Layout, with_tokens

_LARGEST_GROUP = 64
_HEAD_DIMS = range(16, 257)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CODES = (torch.float8_e4m3fn, torch.int8)
"""Dtypes of caches that have scales."""


def check_queries(dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """q's; shape: without T."""
    if len(shape) != 2 or dtype not in _DTYPES or strides[1:] != (shape[1], 1):
        raise KernelError(
            f"decode attention takes q (T, H, D) with strides (any, D, 1) in one of {_DTYPES}; got "
            f"{with_tokens(shape)}, strides {strides}, {dtype}"
        )


def check_out(out: torch.Tensor, q: torch.Tensor, q_shape: torch.Size) -> None:
    """out (T, H, D) like q. What is wrong with q is told before."""
    if out.shape != q_shape or out.dtype != q.dtype or not out.is_contiguous():
        check_queries(q.dtype, q_shape[1:], q.stride())
        raise KernelError(
            f"out must be contiguous, {tuple(q_shape)} {q.dtype}; it is {tuple(out.shape)} {out.dtype}"
        )


def check_caches(q_dtype: torch.dtype, heads: int, head_dim: int, caches: tuple[Layout, Layout]) -> None:
    """k's and v's, for q (T, heads, head_dim)."""
    (k_dtype, k_shape, _), (v_dtype, v_shape, _) = caches
    for dtype, shape, contiguous in caches:
        if len(shape) != 4 or shape != k_shape or not contiguous:
            raise KernelError(
                f"decode attention takes contiguous caches (N, K, B, D); they are {tuple(k_shape)} and "
                f"{tuple(v_shape)}"
            )
        if dtype != k_dtype or dtype not in (q_dtype, *CODES):
            raise KernelError(
                f"caches must both be {q_dtype}, as q, or one of {CODES}; they are {k_dtype} and {v_dtype}"
            )
    if head_dim != k_shape[3] or head_dim not in _HEAD_DIMS:
        raise KernelError(f"head_dim is {head_dim} in q, {k_shape[3]} in the cache; it must be 16 to 256")
    kv_heads = k_shape[1]
    if heads % kv_heads or heads // kv_heads > _LARGEST_GROUP:
        raise KernelError(
            f"{heads} heads over {kv_heads} kv heads: decode attention takes 1 to {_LARGEST_GROUP} for each"
        )


def check_step(
    num_rows: int,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    work_offsets: torch.Tensor,
) -> None:
    """block_tables (R, max_blocks), query_start_loc and the plan's work_offsets (R + 1), seq_lens (R)."""
    tables = block_tables.shape
    if (
        len(tables) not in (1, 2)
        or tables[0] != num_rows
        or block_tables.dtype != torch.int32
        or (block_tables.stride()[-1] != 1 and block_tables.numel())
    ):
        raise _wrong_lengths("block_tables", block_tables, (num_rows, *tables[1:2]))
    for name, tensor, size in (
        ("query_start_loc", query_start_loc, num_rows + 1),
        ("seq_lens", seq_lens, num_rows),
        ("the plan's work_offsets", work_offsets, num_rows + 1),
    ):
        if tensor.shape != (size,) or tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise _wrong_lengths(name, tensor, (size,))


def _wrong_lengths(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> KernelError:
    return KernelError(
        f"{name} must be int32 {shape} with unit stride; it is {tensor.dtype} {tuple(tensor.shape)}"
    )


def check_plan(
    sliding_window: int | None, planned: int | None, slot: tuple[int, int], planned_slot: tuple[int, ...]
) -> None:
    """planned: the window that the plan is for. slot: (H / K, D)."""
    if sliding_window != planned:
        raise KernelError(
            f"sliding_window is {sliding_window}, but the plan was made for {planned}; make a "
            "plan for each window"
        )
    if planned_slot != slot:
        raise KernelError(f"the plan is for {tuple(planned_slot)} heads and sizes, not {slot}")


def check_options(
    heads: int, cache: Layout, sinks: Layout | None, scales: tuple[Layout | None, Layout | None]
) -> None:
    """Sinks and scales (k's, v's), for a cache that has been checked."""
    if sinks is not None and sinks != (torch.float32, (heads,), True):
        raise KernelError(
            f"sinks must be contiguous float32 ({heads},); they are {sinks[0]} {tuple(sinks[1])}"
            + ("" if sinks[2] else ", not contiguous")
        )
    cache_dtype, cache_shape, _ = cache
    shapes = ((1,), tuple(cache_shape[:3])) if cache_dtype in CODES else (None,)
    given = tuple(None if scale is None else tuple(scale[1]) for scale in scales)
    if given[0] != given[1] or given[0] not in shapes:
        raise KernelError(
            f"k_scale and v_scale of a {cache_dtype} cache must have the same of these shapes: {shapes}; "
            f"they have {given}"
        )
    for scale in scales:
        if scale is not None and (scale[0] != torch.float32 or not scale[2]):
            raise KernelError(f"k_scale and v_scale must be contiguous float32; one is {scale[0]}")
