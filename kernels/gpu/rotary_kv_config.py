"""What qk_norm_rotary_kv_write is compiled for."""

from typing import Any

import torch

from halimede.kernels.gpu.rotary_kv_checks import check_caches, check_qkv, check_tables, check_weights
from halimede.kernels.target import Target
from halimede.kernels.tuning import KernelConfig, next_power_of_2, pick_config
from halimede.kernels.variant_key import Layout

_CACHES = {torch.float8_e4m3fn: "e4m3", torch.int8: "int8"}


def write_choice(
    target: Target,
    num_tokens: int,
    qkv: tuple[torch.dtype, tuple[int, ...], tuple[int, ...]],
    heads: tuple[int, int],
    caches: tuple[Layout, Layout],
    scales: tuple[Layout | None, Layout | None],
    tables: tuple[Layout | None, Layout | None, bool],
    weights: tuple[Layout | None, Layout | None],
) -> tuple[KernelConfig, dict[str, Any]]:
    """The tuned config, or the heuristic's, and the kernel's other constants. Checks all but num_tokens.

    num_tokens: see tuned_bucket. qkv: dtype, shape without T, strides. heads: H and K. caches, scales: k's
    and v's. tables: cos, sin, interleaved. weights: q's and k's.
    """
    (dtype, token_shape, strides), (num_heads, num_kv_heads) = qkv, heads
    (cos, sin, interleaved), (k_scale, _) = tables, scales
    cache_dtype, cache_shape, _ = caches[0]
    head_dim = cache_shape[-1]
    check_qkv(dtype, token_shape, strides, num_heads + 2 * num_kv_heads, head_dim)
    check_tables(cos, sin, head_dim)
    check_weights(*weights, head_dim, dtype)
    check_caches(caches, scales, num_kv_heads)
    half = 0 if cos is None else cos[1][1]
    parts = [part for part in (half * (1 + interleaved), head_dim - 2 * half) if part]
    config = pick_config(
        "qk_norm_rotary_kv_write",
        target,
        f"{dtype},{head_dim}",
        num_tokens,
        lambda: _heuristic(target, head_dim, parts),
    )
    return config, {
        "NATIVE": target.native_e4m3,
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "TOKEN_STRIDE": strides[0],
        "BLOCK_SIZE": cache_shape[2],
        "HALF": half,
        "INTERLEAVED": interleaved,
        "NORM": weights[0] is not None,
        "CACHE": _CACHES.get(cache_dtype, "float"),
        "PER_HEAD": k_scale is not None and len(k_scale[1]) == 3,
    }


def _heuristic(target: Target, head_dim: int, parts: list[int]) -> KernelConfig:
    """A thread has 16 bytes of each part of a head, at most 64 elements. parts: elements loaded as one."""
    widest, narrowest = next_power_of_2(max(parts)), next_power_of_2(min(parts))
    rows = max(1, 1024 // widest)
    num_warps = max(1, min(128, rows * narrowest // 8) // target.warp_size)
    threads = num_warps * target.warp_size
    rows = min(max(rows, 8 * threads // narrowest), max(1, 64 * threads // next_power_of_2(head_dim)))
    return KernelConfig({"ROWS": rows}, num_warps=num_warps, num_stages=1)
