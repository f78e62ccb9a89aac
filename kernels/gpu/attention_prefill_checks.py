"""What the prefill attention kernel takes: KernelError for anything else, with what was given.

Layouts are given in place of tensors that are the same at every launch: what a variant is found by.
"""

import torch

from halimede.errors import KernelError
from halimede.kernels.variant_key import Layout, with_tokens

LARGEST_GROUP = 64
"""Query heads of a kv head: as many as rows of the smallest product."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_queries(dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """q's; shape: without T."""
    require(
        dtype in _DTYPES and len(shape) == 2 and strides[1:] == (shape[1], 1),
        f"q must be (T, H, D) with strides (t, D, 1), float16, bfloat16 or float32; it is "
        f"{with_tokens(shape)} {dtype} with strides {strides}",
    )


def check_out(out: torch.Tensor, q: torch.Tensor, q_shape: torch.Size) -> None:
    """out (T, H, D) like q. What is wrong with q is told before."""
    if out.shape != q_shape or out.dtype != q.dtype or not out.is_contiguous():
        check_queries(q.dtype, q_shape[1:], q.stride())
        raise _refused(
            f"out must be contiguous, with shape and dtype of q, {_describe(q)}; it is {_describe(out)}"
        )


def check_caches(
    q_dtype: torch.dtype, heads: int, head_dim: int, k_cache: Layout, v_cache: Layout, sinks: Layout | None
) -> None:
    """Caches [N, K, B, D] and sinks (H), for q (T, heads, head_dim)."""
    for name, (dtype, shape, contiguous) in (("k_cache", k_cache), ("v_cache", v_cache)):
        require(
            len(shape) == 4
            and shape == k_cache[1]
            and shape[3] == head_dim
            and dtype in (q_dtype, torch.float8_e4m3fn, torch.int8)
            and dtype == k_cache[0]
            and contiguous,
            f"{name} must be a contiguous [N, K, B, {head_dim}], of q's dtype {q_dtype}, float8_e4m3fn or "
            f"int8, and the caches alike; it is {_describe_layout((dtype, shape, contiguous))}",
        )
    kv_heads, block_size = k_cache[1][1:3]
    require(
        heads % kv_heads == 0 and heads // kv_heads <= LARGEST_GROUP,
        f"{heads} heads cannot share {kv_heads} kv heads evenly, at most {LARGEST_GROUP} each",
    )
    require(
        block_size >= 16 and block_size & (block_size - 1) == 0,
        f"block_size must be a power of two from 16 on; it is {block_size}",
    )
    require(
        sinks in (None, (torch.float32, (heads,), True)),
        f"sinks must be ({heads}) float32; they are {_describe_layout(sinks)}",
    )


def check_step(block_tables: torch.Tensor, query_start_loc: torch.Tensor, seq_lens: torch.Tensor) -> int:
    """block_tables (R, max_blocks), query_start_loc (R + 1), seq_lens (R); returns R."""
    rows, tables = seq_lens.shape, block_tables.shape
    if len(rows) != 1 or len(tables) != 2 or tables[0] != rows[0] or block_tables.stride()[1] != 1:
        raise _refused(
            f"block_tables must be (R, max_blocks) with unit stride and seq_lens (R); they are "
            f"{_describe(block_tables)} and {_describe(seq_lens)}"
        )
    num_rows = rows[0]
    if query_start_loc.shape != (num_rows + 1,):
        raise _refused(f"query_start_loc must be ({num_rows + 1}); it is {_describe(query_start_loc)}")
    if (
        not block_tables.dtype == query_start_loc.dtype == seq_lens.dtype == torch.int32
        or not query_start_loc.is_contiguous()
        or not seq_lens.is_contiguous()
    ):
        step = (block_tables, query_start_loc, seq_lens)
        raise _refused(
            "block_tables, query_start_loc and seq_lens must be contiguous int32; they are "
            + ", ".join(_describe(tensor) for tensor in step)
        )
    return num_rows


def check_scales(k_cache: Layout, k_scale: Layout | None, v_scale: Layout | None) -> None:
    """Both scales, (1) or [N, K, B], if and only if the cache holds 8-bit codes."""
    dtype, shape, _ = k_cache
    if dtype.itemsize > 1:
        require(
            k_scale is None and v_scale is None,
            f"a cache of {dtype} has no scales; leave k_scale and v_scale out",
        )
        return
    require(
        k_scale == v_scale and k_scale in ((torch.float32, (1,), True), (torch.float32, shape[:3], True)),
        f"a cache of {dtype} needs k_scale and v_scale, contiguous float32 of (1) or {tuple(shape[:3])}; "
        f"they are {_describe_layout(k_scale)} and {_describe_layout(v_scale)}",
    )


def check_numbers(scale: float, sliding_window: int | None, softcap: float | None) -> None:
    """All are positive."""
    # The largest score is looked for before scaling, so the scale must not turn the order round.
    if not scale > 0:
        raise _refused(f"scale must be positive; it is {scale}")
    if softcap is not None and not softcap > 0:
        raise _refused(f"softcap must be positive, or None; it is {softcap}")
    if sliding_window is not None and sliding_window <= 0:
        raise _refused(f"sliding_window must be at least 1, or None; it is {sliding_window}")


def require(condition: bool, fact: str) -> None:
    """KernelError that says `fact` unless the condition holds. Not at every launch: making it takes time."""
    if not condition:
        raise _refused(fact)


def _refused(fact: str) -> KernelError:
    return KernelError(f"attention_prefill: {fact}")


def _describe(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}"


def _describe_layout(layout: Layout | None) -> str:
    if layout is None:
        return "None"
    dtype, shape, contiguous = layout
    return f"{tuple(shape)} {dtype}{'' if contiguous else ', not contiguous'}"
