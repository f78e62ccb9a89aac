"""What the prefill attention kernel is compiled for.

Block sizes, where no tuned table says others, are what fits without spills.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from halimede.kernels.gpu.attention_prefill_checks import (
    check_caches,
    check_queries,
    check_scales,
    require,
)
from halimede.kernels.target import Target
from halimede.kernels.tuning import KernelConfig, pick_config
from halimede.kernels.variant_key import Layout

_SMALLEST_PART = 16
# Triton spreads a product with more columns than rows over warps in a way that computes scores repeatedly.
_LARGEST_PART = 128


def head_parts(head_dim: int) -> tuple[int, int]:
    """Powers of two that add up to head_dim, the second 0 if one is enough; KernelError if two are not."""
    main = min(1 << (head_dim.bit_length() - 1), _LARGEST_PART)
    rest = head_dim - main
    require(
        main >= _SMALLEST_PART and (rest == 0 or (_SMALLEST_PART <= rest <= main and rest & (rest - 1) == 0)),
        f"head_dim must be at most 256 and a power of two, or the sum of two, from 16 on; it is {head_dim}",
    )
    return main, rest


def prefill_choice(
    target: Target,
    num_tokens: int,
    q: tuple[torch.dtype, tuple[int, ...], tuple[int, ...]],
    caches: tuple[Layout, Layout],
    scales: tuple[Layout | None, Layout | None],
    sinks: Layout | None,
    options: tuple[bool, bool, bool],
) -> tuple[KernelConfig, dict[str, Any]]:
    """The tuned config, or default_config's, and the kernel's other constants. Checks all but num_tokens.

    num_tokens: see tuned_bucket. q: dtype, shape without T, strides. caches, scales: k's and v's. options:
    causal, and whether there are a sliding window and a softcap.
    """
    check_queries(*q)
    dtype, (heads, head_dim), strides = q
    check_caches(dtype, heads, head_dim, *caches, sinks)
    check_scales(caches[0], *scales)
    main, rest = head_parts(head_dim)
    cache_dtype, (_, kv_heads, block_size, _), _ = caches[0]
    causal, has_window, has_softcap = options
    is_plain = not has_window and not has_softcap
    config = pick_config(
        "attention_prefill",
        target,
        f"{dtype},{cache_dtype},{head_dim},{block_size},{'plain' if is_plain else 'masked'}",
        num_tokens,
        lambda: default_config(target, dtype, cache_dtype, head_dim, block_size, is_plain),
    )
    scale_dims = 0 if scales[0] is None else len(scales[0][1])
    return config, {
        "CAUSAL": causal,
        "Q_STRIDE": strides[0],
        "SCALE_PER_TENSOR": scale_dims == 1,
        "SCALE_PER_TOKEN": scale_dims == 3,
        "NATIVE": target.native_e4m3,
        "GROUP": heads // kv_heads,
        "KV_HEADS": kv_heads,
        "BLOCK_SIZE": block_size,
        "MAIN": main,
        "REST": rest,
    }


def default_config(
    target: Target,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    head_dim: int,
    block_size: int,
    is_plain: bool,
) -> KernelConfig:
    """BLOCK_M, BLOCK_N and V_PARTS by what a thread's registers hold: a product's rows, head and weights.

    is_plain: without a sliding window and a softcap, which need registers too.
    """
    is_quantized = cache_dtype.itemsize == 1
    if target.backend == "hip":
        return _hip_config(target, dtype, is_quantized, head_dim, is_plain)
    if dtype == torch.float32:
        return _config(64, 32 if head_dim <= 128 else 16, stages=2)
    # Several blocks in a tile, and masks, are what the largest tile of a head of 128 has no registers for.
    is_light = head_dim == 128 and block_size >= 64 and is_plain
    _, rest = head_parts(head_dim)
    if target.wgmma and is_quantized and rest:
        # ptxas of Triton 3.6 makes wrong code of two products into one sum whose keys are decoded, so a head
        # is cut in pieces of one size: scores are computed again for each piece of the values.
        return _config(128, 64, stages=2, v_parts=head_dim // rest, piece=rest)
    if target.wgmma:
        # 128 keys: with 64 a product waits for shared memory.
        is_wide = not is_quantized and (head_dim < 128 or is_light)
        return _config(128, 128 if is_wide else 64, stages=3 if head_dim <= 128 and not is_wide else 2)
    if target.arch == 100:
        # Left alone, Triton limits small programs to 128 registers, for two of them on a multiprocessor.
        return _config(128, 64, stages=2, options={"maxnreg": 255})
    if head_dim > 192:
        return _config(128, 32, stages=2, v_parts=head_dim // 128)
    if head_dim > 128:
        return _config(128, 16, stages=2)
    if head_dim == 128 and (is_quantized or (target.arch == 120 and not is_plain)):
        return _config(64, 32 if is_quantized else 64, stages=2)
    return _config(128, 64 if not is_quantized and (head_dim <= 64 or is_light) else 32, stages=2)


def _hip_config(
    target: Target, dtype: torch.dtype, is_quantized: bool, head_dim: int, is_plain: bool
) -> KernelConfig:
    if target.warp_size == 64:
        if dtype == torch.float32:
            return _config(64, 32)
        is_light = head_dim <= 64 or (is_plain and not is_quantized)
        return _config(128, (64 if is_light else 32) if head_dim <= 128 else 16)
    if dtype == torch.float32:
        return _config(32, 16)
    if head_dim <= 64:
        return _config(128, 32)
    if head_dim <= 128 and not is_quantized:
        return _config(128, 16)
    # gfx11 holds a product's rows twice, so it has no registers for a whole head of q.
    piece = math.gcd(head_dim, 64) if target.name.startswith("gfx11") else 0
    return _config(64, 16, piece=piece)


def _config(
    block_m: int,
    block_n: int,
    *,
    stages: int = 1,
    v_parts: int = 1,
    piece: int = 0,
    options: Mapping[str, int] = MappingProxyType({}),
) -> KernelConfig:
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "V_PARTS": v_parts, "PIECE": piece}
    return KernelConfig(blocks, num_warps=8, num_stages=stages, options=options)
