"""Sums of a product whose K is split over programs: added in order by the last of them to arrive.

Every program of a tile of y leaves its partial sums in memory and counts itself; who finds that all others
have come adds the partials from the first to the last, whatever order they came in. So there is one launch,
no float atomics, and the same bits at every run. The last one sets the counter back to 0 for the next
launch in the stream.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from halimede.kernels.gpu.attention_decode_reduce import arrive
from halimede.kernels.target import Target
from halimede.kernels.tuning import KernelConfig


@triton.jit
def leave_partial(
    acc, partials_ptr, counters_ptr, tile, split, SPLITS: tl.constexpr, FENCE_THREADS: tl.constexpr
):
    """Store acc [N, M] as one of SPLITS partials of a tile; how many others had done so."""
    partial = _partial(partials_ptr, tile, split, SPLITS, acc.shape[0], acc.shape[1])
    tl.store(partial, acc)
    SIZE: tl.constexpr = acc.shape[0] * acc.shape[1]
    start = partials_ptr + (tile.to(tl.int64) * SPLITS + split) * SIZE
    return arrive(counters_ptr + tile, start, SIZE, FENCE_THREADS)


@triton.jit
def sum_partials(
    partials_ptr, counters_ptr, tile, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr
):
    """The sum of all partials of a tile, [BLOCK_N, BLOCK_M] float32, in their order; resets the counter."""
    # What an earlier launch left in a cache of this processor is not what was stored now.
    total = tl.load(_partial(partials_ptr, tile, 0, SPLITS, BLOCK_N, BLOCK_M), cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        total += tl.load(_partial(partials_ptr, tile, split, SPLITS, BLOCK_N, BLOCK_M), cache_modifier=".cg")
    tl.store(counters_ptr + tile, 0)
    return total


@triton.jit
def _partial(partials_ptr, tile, split, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    start = (tile.to(tl.int64) * SPLITS + split) * (BLOCK_N * BLOCK_M)
    return partials_ptr + start + tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]


def split_workspace(
    counters: torch.Tensor, constants: Mapping[str, Any], grid: tuple[int, int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """(partials, counters) of a launch over (blocks of rows, of columns, splits); None: nothing is split.

    counters: int32, zeros, that the weight has; a launch with more tiles gets some of its own, which
    happens for many rows that are split all the same, to be summed as few are.
    """
    if grid[2] == 1:
        return None, None
    tiles = grid[0] * grid[1]
    size = tiles * grid[2] * constants["BLOCK_M"] * constants["BLOCK_N"]
    partials = counters.new_empty((size,), dtype=dtype)
    return partials, counters if tiles <= len(counters) else counters.new_zeros((tiles,))


def fence_threads(target: Target, config: KernelConfig) -> int:
    """FENCE_THREADS of a launch; see attention_decode_reduce.arrive."""
    return config.num_warps * target.warp_size if target.backend == "hip" else 0
