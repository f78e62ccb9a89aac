"""Sums of a product whose K is split over programs: added in order by the last of them to arrive.

Every program of a tile of y leaves its partial sums in memory and counts itself; who finds that all others
have come adds the partials from the first to the last, whatever order they came in. So there is one launch,
no float atomics, and the same bits at every run. The last one sets the counter back to 0 for the next
launch in the stream.
"""

import triton
import triton.language as tl


@triton.jit
def leave_partial(acc, partials_ptr, counters_ptr, tile, split, SPLITS: tl.constexpr):
    """Store acc [N, M] as one of SPLITS partials of a tile; how many others had done so."""
    tl.store(_partial(partials_ptr, tile, split, SPLITS, acc.shape[0], acc.shape[1]), acc)
    # All threads have stored before one of them says so.
    tl.debug_barrier()
    return tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel", scope="gpu")


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
