"""Tiles, warps and stages of decode attention, where no table says otherwise.

On CUDA a tile of keys is about 16 KB. Codes are decoded in registers, which hold half as many elements. AMD
GPUs have 64 KB of shared memory and keep one tile in it.
"""

import torch

from halimede.kernels.target import Target
from halimede.kernels.tuning import KernelConfig, next_power_of_2


def _parts(head_dim: int) -> tuple[int, int]:
    """A head as two powers of two, the second 0 or at least 32; it may reach beyond the head."""
    first = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - first
    return first, max(32, next_power_of_2(rest)) if rest else 0


def heuristic(
    target: Target,
    q_dtype: torch.dtype,
    cache_dtype: torch.dtype,
    head_dim: int,
    group: int,
    block_size: int,
    split_size: int,
) -> KernelConfig:
    """The choice for a target and what is fixed for a model and its engine."""
    num_warps, stages = 4, 3
    first, second = _parts(head_dim)
    tile = 8192 // next_power_of_2(head_dim)
    if target.backend == "hip":
        tile, stages = min(32, tile // 2), 2
    elif _has_little_shared_memory(target) or cache_dtype.itemsize == 1:
        tile //= 2
        stages = 3 + (cache_dtype.itemsize == 1)
    piece = 0
    if target.backend == "hip" and target.warp_size == 32:  # where products take more registers
        is_wide = head_dim > (64 if cache_dtype.itemsize == 1 else 128)
        piece = 64 if is_wide and head_dim % 64 == 0 else 0
    if target.name == "gfx1100":  # and twice as many: halves of a head, nothing ahead
        tile, stages = 16, 1
        first, second = (first, second) if second else (first // 2, first // 2)
    if q_dtype == torch.float32:
        tile, stages = 16, 2
    if group > 16:
        tile //= 2
    tile = max(16, min(tile, max(32, block_size), split_size, 128))
    chunk = 8 * 32 * num_warps // (next_power_of_2(group) * first)
    shared = 2 * max(1, stages - 1) * tile * (first + second) * cache_dtype.itemsize + 2048
    return KernelConfig(
        {
            "TILE": tile,
            "D0": first,
            "D1": second,
            "PIECE": piece,
            "CHUNK": max(1, min(16, chunk)),
            "STAGES": stages,
        },
        num_warps=num_warps,
        num_stages=stages,
        options=_options(target, cache_dtype, head_dim, shared),
    )


def _options(target: Target, cache_dtype: torch.dtype, head_dim: int, shared: int) -> dict[str, int]:
    """As many programs as registers and shared memory of a processor hold. shared: bytes of a program."""
    most = 4 if head_dim <= 64 else 3
    if head_dim > 128 or cache_dtype == torch.int8 or _has_little_shared_memory(target):
        most = 2
    programs = max(1, min(most, target.shared_memory // shared))
    # The compiler would aim at more programs than two, and spill.
    return {"programs_per_processor": programs} | ({"maxnreg": 248} if programs <= 2 else {})


def _has_little_shared_memory(target: Target) -> bool:
    return target.backend == "cuda" and target.shared_memory < 128 << 10
