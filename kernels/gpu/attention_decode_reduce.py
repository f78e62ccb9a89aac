"""What decode attention does after its tiles: parts of a row to the workspace, their sum, and the output.

A part is what a split of a row and kv head gave: row_max (GROUP), row_sum (GROUP) and two accumulators of D0
and D1 elements of the head. A tensor of such heads is (GROUP, HEAD_DIM).
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def store_part(
    pointer,
    values,
    rows,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Rows of heads, in part: values (rows, SIZE) to a tensor (GROUP, HEAD_DIM)."""
    dims = FIRST + tl.arange(0, SIZE)[None, :]
    mask = rows[:, None] < GROUP
    if FIRST + SIZE > HEAD_DIM:
        mask &= dims < HEAD_DIM
    tl.store(pointer + rows[:, None] * HEAD_DIM + dims, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _load_accumulators(heads, there, FIRST: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """A part of several splits' accumulators, (CHUNK, ROWS, SIZE), past the first level of caches."""
    dims = FIRST + tl.arange(0, SIZE)[None, None, :]
    mask = there[:, :, None]
    if FIRST + SIZE > HEAD_DIM:
        mask &= dims < HEAD_DIM
    return tl.load(heads[:, :, None] + dims, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def finish(
    out_ptr,
    sinks_ptr,
    v_scale_ptr,
    head,
    rows,
    row_max,
    row_sum,
    acc0,
    acc1,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    WEIGHT_SCALE: tl.constexpr,
):
    """The softmax's denominator, with the sinks, and the output of a kv head's group."""
    factor = 1.0 / WEIGHT_SCALE
    if v_scale_ptr is not None and not PER_TOKEN:
        factor *= tl.load(v_scale_ptr)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head * GROUP + rows, mask=rows < GROUP, other=0.0) * _LOG2_E
        new_max = tl.maximum(row_max, sink)
        decay = tl.exp2(row_max - new_max)
        row_sum = row_sum * decay + tl.exp2(sink - new_max)
        factor *= decay
    factor = (factor / row_sum)[:, None]
    store_part(out_ptr, acc0 * factor, rows, 0, D0, GROUP, HEAD_DIM)
    if D1 > 0:
        store_part(out_ptr, acc1 * factor, rows, D0, D1, GROUP, HEAD_DIM)


@triton.jit
def arrive(counter, part, SIZE: tl.constexpr, FENCE_THREADS: tl.constexpr):
    """Count a stored part; how many were counted before it. Their stores happened before what follows.

    One thread counts for all. On CUDA the barriers around it order the others' memory accesses as well. On
    AMD they do not: a wave waits for its own stores only, and may have a cache of its own. There each of the
    FENCE_THREADS threads (CUDA: 0) adds 0 to the SIZE words of the part, which releases and acquires.
    """
    if FENCE_THREADS > 0:
        words = part.to(tl.pointer_type(tl.int32), bitcast=True) + tl.arange(0, FENCE_THREADS) % SIZE
        tl.atomic_add(words, 0, sem="acq_rel")
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel")
    tl.debug_barrier()
    if FENCE_THREADS > 0:
        tl.atomic_add(words, 0, sem="acq_rel")
    return arrived


@triton.jit
def reduce_splits(
    out_ptr,
    sinks_ptr,
    v_scale_ptr,
    accumulators_ptr,
    statistics_ptr,
    slot,
    num_splits,
    head,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    WEIGHT_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The parts of a row and kv head, in the order of its splits, to the output. slot: of the first split."""
    rows = tl.arange(0, ROWS)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc0 = tl.zeros([ROWS, D0], tl.float32)
    acc1 = tl.zeros([ROWS, D1 if D1 > 0 else 16], tl.float32)
    for first in tl.range(0, num_splits, CHUNK, num_stages=STAGES):
        splits = first + tl.arange(0, CHUNK)
        slots = slot + splits * NUM_KV_HEADS
        there = (splits < num_splits)[:, None] & (rows < GROUP)[None, :]
        statistics = statistics_ptr + (slots * (2 * GROUP))[:, None] + rows[None, :]
        part_max = tl.load(statistics, mask=there, other=float("-inf"), cache_modifier=".cg")
        part_sum = tl.load(statistics + GROUP, mask=there, other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(row_max, tl.max(part_max, 0))
        decay, weights = tl.exp2(row_max - new_max), tl.exp2(part_max - new_max[None, :])
        row_max = new_max
        row_sum = row_sum * decay + tl.sum(part_sum * weights, 0)
        heads = accumulators_ptr + (slots * (GROUP * HEAD_DIM))[:, None] + (rows * HEAD_DIM)[None, :]
        part = _load_accumulators(heads, there, 0, D0, HEAD_DIM)
        acc0 = acc0 * decay[:, None] + tl.sum(part * weights[:, :, None], 0)
        if D1 > 0:
            part = _load_accumulators(heads, there, D0, D1, HEAD_DIM)
            acc1 = acc1 * decay[:, None] + tl.sum(part * weights[:, :, None], 0)
    finish(
        out_ptr, sinks_ptr, v_scale_ptr, head, rows, row_max, row_sum, acc0, acc1,
        GROUP, HEAD_DIM, D0, D1, PER_TOKEN, WEIGHT_SCALE,
    )  # fmt: skip
