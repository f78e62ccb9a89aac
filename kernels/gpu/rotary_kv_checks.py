"""What qk_norm_rotary_kv_write refuses, with KernelError: each check says what it takes and what it got."""

import torch

from halimede.errors import KernelError

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check_tokens(
    qkv: torch.Tensor, positions: torch.Tensor, slot_mapping: torch.Tensor, heads: int, head_dim: int
) -> None:
    """heads: of q, k and v together."""
    shape = tuple(qkv.shape[1:])
    if (
        shape not in ((heads, head_dim), (heads * head_dim,))
        or qkv.stride()[1:] != (head_dim, 1)[-len(shape) :]
    ):
        raise KernelError(
            f"qk_norm_rotary_kv_write takes qkv (T, {heads * head_dim}) or (T, {heads}, {head_dim}), dense "
            f"inside a token; it is {tuple(qkv.shape)} with strides {qkv.stride()}"
        )
    if qkv.dtype not in FLOATS:
        raise KernelError(
            f"qk_norm_rotary_kv_write takes qkv of float16, bfloat16 or float32; it is {qkv.dtype}"
        )
    for name, given in (("positions", positions), ("slot_mapping", slot_mapping)):
        if given.shape != qkv.shape[:1] or given.dtype != torch.int64 or not given.is_contiguous():
            raise KernelError(
                f"qk_norm_rotary_kv_write takes contiguous int64 {name} of {qkv.shape[0]} tokens; they are "
                f"{given.dtype} {tuple(given.shape)} with strides {given.stride()}"
            )


def check_tables(cos: torch.Tensor | None, sin: torch.Tensor | None, head_dim: int) -> None:
    """cos and sin (positions, half) float32, or neither."""
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise KernelError("qk_norm_rotary_kv_write takes both of cos and sin or neither; one is missing")
    usable = all(table.dtype == torch.float32 and table.is_contiguous() for table in (cos, sin))
    if not usable or cos.dim() != 2 or cos.shape != sin.shape or not 0 < 2 * cos.shape[1] <= head_dim:
        raise KernelError(
            f"qk_norm_rotary_kv_write takes contiguous float32 cos and sin (positions, half), half at most "
            f"{head_dim // 2}; they are {cos.dtype} {tuple(cos.shape)} and {sin.dtype} {tuple(sin.shape)}"
        )


def check_weights(
    q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, head_dim: int, dtype: torch.dtype
) -> None:
    """The norms' weights (D), of qkv's dtype or float32, or neither."""
    if q_weight is None and k_weight is None:
        return
    if q_weight is None or k_weight is None:
        raise KernelError("qk_norm_rotary_kv_write takes both norm weights or neither; one is missing")
    for weight in (q_weight, k_weight):
        if weight.shape != (head_dim,) or weight.dtype not in (dtype, torch.float32) or weight.stride(0) != 1:
            raise KernelError(
                f"qk_norm_rotary_kv_write takes norm weights ({head_dim}) of {dtype} or float32; one is "
                f"{tuple(weight.shape)} {weight.dtype}"
            )


def check_caches(
    caches: tuple[torch.Tensor, torch.Tensor],
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
    num_kv_heads: int,
) -> None:
    """Both caches [N, K, B, D], and their scales if they are of 8 bits."""
    (k, v), (k_scale, v_scale) = caches, scales
    if (
        k.dim() != 4
        or k.shape != v.shape
        or k.dtype != v.dtype
        or k.shape[1] != num_kv_heads
        or not (k.is_contiguous() and v.is_contiguous())
    ):
        raise KernelError(
            f"qk_norm_rotary_kv_write takes contiguous caches [N, {num_kv_heads}, B, D], k's and v's alike; "
            f"they are {tuple(k.shape)} {k.dtype} and {tuple(v.shape)} {v.dtype}"
        )
    if k.dtype in FLOATS and k_scale is None and v_scale is None:
        return
    if (
        k.dtype not in (torch.float8_e4m3fn, torch.int8)
        or k_scale is None
        or v_scale is None
        or k_scale.shape != v_scale.shape
        or k_scale.shape not in ((1,), k.shape[:3])
        or not all(s.dtype == torch.float32 and s.is_contiguous() for s in (k_scale, v_scale))
    ):
        raise KernelError(
            f"qk_norm_rotary_kv_write takes caches of 16 or 32 bit floats without scales, or float8_e4m3fn "
            f"or int8 with contiguous float32 scales (1) or {tuple(k.shape[:3])}; got {k.dtype} with "
            f"{None if k_scale is None else tuple(k_scale.shape)} and "
            f"{None if v_scale is None else tuple(v_scale.shape)}"
        )
