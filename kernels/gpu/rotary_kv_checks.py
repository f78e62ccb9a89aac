"""What qk_norm_rotary_kv_write refuses, with KernelError: each check says what it takes and what it got.

Layouts are given in place of tensors that are the same at every launch: what a variant is found by.
"""

import torch

from halimede.errors import KernelError
from halimede.kernels.variant_key import Layout, with_tokens

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check_qkv(
    dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], heads: int, head_dim: int
) -> None:
    """(T, heads * head_dim) or (T, heads, head_dim). shape: without T. heads: of q, k and v together."""
    if shape not in ((heads, head_dim), (heads * head_dim,)) or strides[1:] != (head_dim, 1)[-len(shape) :]:
        raise KernelError(
            f"qk_norm_rotary_kv_write takes qkv (T, {heads * head_dim}) or (T, {heads}, {head_dim}), dense "
            f"inside a token; it is {with_tokens(shape)} with strides {strides}"
        )
    if dtype not in FLOATS:
        raise KernelError(f"qk_norm_rotary_kv_write takes qkv of float16, bfloat16 or float32; it is {dtype}")


def check_tokens(positions: torch.Tensor, slot_mapping: torch.Tensor, num_tokens: int) -> None:
    """What there is one of for each token."""
    shape = (num_tokens,)
    for name, given in (("positions", positions), ("slot_mapping", slot_mapping)):
        if given.shape != shape or given.dtype != torch.int64 or not given.is_contiguous():
            raise KernelError(
                f"qk_norm_rotary_kv_write takes contiguous int64 {name} of {num_tokens} tokens; they are "
                f"{given.dtype} {tuple(given.shape)} with strides {given.stride()}"
            )


def check_tables(cos: Layout | None, sin: Layout | None, head_dim: int) -> None:
    """cos and sin (positions, half) float32, or neither."""
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise KernelError("qk_norm_rotary_kv_write takes both of cos and sin or neither; one is missing")
    (cos_dtype, cos_shape, _), (sin_dtype, sin_shape, _) = cos, sin
    usable = all(dtype == torch.float32 and contiguous for dtype, _, contiguous in (cos, sin))
    if not usable or len(cos_shape) != 2 or cos_shape != sin_shape or not 0 < 2 * cos_shape[1] <= head_dim:
        raise KernelError(
            f"qk_norm_rotary_kv_write takes contiguous float32 cos and sin (positions, half), half at most "
            f"{head_dim // 2}; they are {cos_dtype} {tuple(cos_shape)} and {sin_dtype} {tuple(sin_shape)}"
        )


def check_weights(
    q_weight: Layout | None, k_weight: Layout | None, head_dim: int, qkv_dtype: torch.dtype
) -> None:
    """The norms' weights (D), of qkv's dtype or float32, or neither."""
    if q_weight is None and k_weight is None:
        return
    if q_weight is None or k_weight is None:
        raise KernelError("qk_norm_rotary_kv_write takes both norm weights or neither; one is missing")
    for dtype, shape, contiguous in (q_weight, k_weight):
        if shape != (head_dim,) or dtype not in (qkv_dtype, torch.float32) or not contiguous:
            raise KernelError(
                f"qk_norm_rotary_kv_write takes norm weights ({head_dim}) of {qkv_dtype} or float32; one is "
                f"{tuple(shape)} {dtype}"
            )


def check_caches(
    caches: tuple[Layout, Layout], scales: tuple[Layout | None, Layout | None], num_kv_heads: int
) -> None:
    """Both caches [N, K, B, D], and their scales if they are of 8 bits."""
    (k, v), (k_scale, v_scale) = caches, scales
    (k_dtype, k_shape, contiguous), (v_dtype, v_shape, _) = k, v
    if len(k_shape) != 4 or k != v or k_shape[1] != num_kv_heads or not contiguous:
        raise KernelError(
            f"qk_norm_rotary_kv_write takes contiguous caches [N, {num_kv_heads}, B, D], k's and v's alike; "
            f"they are {tuple(k_shape)} {k_dtype} and {tuple(v_shape)} {v_dtype}"
        )
    if k_dtype in FLOATS and k_scale is None and v_scale is None:
        return
    if (
        k_dtype not in (torch.float8_e4m3fn, torch.int8)
        or k_scale is None
        or k_scale != v_scale
        or k_scale[0] != torch.float32
        or k_scale[1] not in ((1,), k_shape[:3])
        or not k_scale[2]
    ):
        raise KernelError(
            f"qk_norm_rotary_kv_write takes caches of 16 or 32 bit floats without scales, or float8_e4m3fn "
            f"or int8 with contiguous float32 scales (1) or {tuple(k_shape[:3])}; got {k_dtype} with "
            f"{None if k_scale is None else tuple(k_scale[1])} and "
            f"{None if v_scale is None else tuple(v_scale[1])}"
        )
