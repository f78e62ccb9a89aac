"""What the prefill attention kernel takes: KernelError for anything else, with what was given."""

import torch

from halimede.errors import KernelError

LARGEST_GROUP = 64
"""Query heads of a kv head: as many as rows of the smallest product."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_tensors(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    sinks: torch.Tensor | None,
) -> None:
    """q (T, H, D), caches [N, K, B, D], out (T, H, D), sinks (H)."""
    require(
        q.dtype in _DTYPES and q.dim() == 3 and q.stride()[1:] == (q.shape[-1], 1),
        f"q must be (T, H, D) with strides (t, D, 1), float16, bfloat16 or float32; it is {_describe(q)}",
    )
    require(
        out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous(),
        f"out must be contiguous, with shape and dtype of q, {_describe(q)}; it is {_describe(out)}",
    )
    heads, head_dim = q.shape[1:]
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        require(
            cache.dim() == 4
            and cache.shape == k_cache.shape
            and cache.shape[3] == head_dim
            and cache.dtype in (q.dtype, torch.float8_e4m3fn, torch.int8)
            and cache.dtype == k_cache.dtype
            and cache.is_contiguous(),
            f"{name} must be a contiguous [N, K, B, {head_dim}], of q's dtype {q.dtype}, float8_e4m3fn or "
            f"int8, and the caches alike; it is {_describe(cache)}",
        )
    kv_heads, block_size = k_cache.shape[1:3]
    require(
        heads % kv_heads == 0 and heads // kv_heads <= LARGEST_GROUP,
        f"{heads} heads cannot share {kv_heads} kv heads evenly, at most {LARGEST_GROUP} each",
    )
    require(
        block_size >= 16 and block_size & (block_size - 1) == 0,
        f"block_size must be a power of two from 16 on; it is {block_size}",
    )
    require(
        sinks is None or (sinks.shape == (heads,) and sinks.dtype == torch.float32 and sinks.is_contiguous()),
        f"sinks must be ({heads}) float32; they are {_describe(sinks)}",
    )


def check_step(block_tables: torch.Tensor, query_start_loc: torch.Tensor, seq_lens: torch.Tensor) -> None:
    """block_tables (R, max_blocks), query_start_loc (R + 1), seq_lens (R)."""
    num_rows = seq_lens.shape[0] if seq_lens.dim() == 1 else -1
    require(
        block_tables.dim() == 2 and block_tables.shape[0] == num_rows and block_tables.stride(1) == 1,
        f"block_tables must be (R, max_blocks) with unit stride and seq_lens (R); they are "
        f"{_describe(block_tables)} and {_describe(seq_lens)}",
    )
    require(
        query_start_loc.shape == (num_rows + 1,),
        f"query_start_loc must be ({num_rows + 1}); it is {_describe(query_start_loc)}",
    )
    step = (block_tables, query_start_loc, seq_lens)
    require(
        all(tensor.dtype == torch.int32 for tensor in step)
        and query_start_loc.is_contiguous()
        and seq_lens.is_contiguous(),
        "block_tables, query_start_loc and seq_lens must be contiguous int32; they are "
        + ", ".join(_describe(tensor) for tensor in step),
    )


def check_scales(k_cache: torch.Tensor, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None) -> None:
    """Both scales, (1) or [N, K, B], if and only if the cache holds 8-bit codes."""
    if k_cache.dtype.itemsize > 1:
        require(
            k_scale is None and v_scale is None,
            f"a cache of {k_cache.dtype} has no scales; leave k_scale and v_scale out",
        )
        return
    shapes = (torch.Size((1,)), k_cache.shape[:3])
    require(
        k_scale is not None
        and v_scale is not None
        and k_scale.shape == v_scale.shape
        and k_scale.shape in shapes
        and all(scale.dtype == torch.float32 and scale.is_contiguous() for scale in (k_scale, v_scale)),
        f"a cache of {k_cache.dtype} needs k_scale and v_scale, contiguous float32 of (1) or "
        f"{tuple(k_cache.shape[:3])}; they are {_describe(k_scale)} and {_describe(v_scale)}",
    )


def check_numbers(scale: float, sliding_window: int | None, softcap: float | None) -> None:
    """All are positive."""
    # The largest score is looked for before scaling, so the scale must not turn the order round.
    require(scale > 0, f"scale must be positive; it is {scale}")
    require(softcap is None or softcap > 0, f"softcap must be positive, or None; it is {softcap}")
    require(
        sliding_window is None or sliding_window > 0,
        f"sliding_window must be at least 1, or None; it is {sliding_window}",
    )


def require(condition: bool, fact: str) -> None:
    """KernelError that says `fact` unless the condition holds."""
    if not condition:
        raise KernelError(f"attention_prefill: {fact}")


def _describe(tensor: torch.Tensor | None) -> str:
    if tensor is None:
        return "None"
    return f"{tuple(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}"
