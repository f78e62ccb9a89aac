"""Paged attention of rows with one query token (decode): y = softmax(q k^T * scale) v over a row's tokens.

Layouts: q (T, H, D), strides (t, D, 1); caches [N, K, B, D] contiguous, float8_e4m3fn and int8 with scales
(1) or [N, K, B]; block_tables (R, max_blocks), query_start_loc (R + 1), seq_lens (R), int32; out (T, H, D).
Rows of another number of query tokens, and their part of `out`, are left alone. Lengths are read on the
device only. Moves 2 * context * K * D elements a row and does 4 * context * H * D FLOPs on them.

The H / K query heads of a kv head are packed in the rows of a product, so a token of the cache is read once.
An item of work is a split (see attention_decode_plan) of a row and kv head; as many programs as the GPU holds
at once walk over the items. Parts of rows with several splits go to a workspace, and the last program to
finish one of a row and kv head reduces all of them in their order: a row's result depends on nothing but it.

To read at the speed of memory some 30 KB must be on their way to a processor at any time (H200: 4.8 TB/s *
0.8 us / 132). A program has two tiles of keys and of values under way, 64 KB in asynchronous copies of 16
bytes, and two or three programs share a processor, so that searching, softmax and reduction of one hide
behind copies of others. The ids of blocks are read a tile ahead. Only the tiles in which the window begins
and the row ends have masks.

Caches of 8 bits are multiplied in float16, which holds both kinds of code exactly, whatever 16-bit type q
has; conversion to bfloat16 takes twice as many instructions. Weights are float16 then, else of q's dtype.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from halimede.kernels.gpu.attention_decode_cases import CASES, SIGNATURES, reference
from halimede.kernels.gpu.attention_decode_checks import (
    check_caches,
    check_options,
    check_out,
    check_plan,
    check_queries,
    check_step,
)
from halimede.kernels.gpu.attention_decode_config import heuristic
from halimede.kernels.gpu.attention_decode_plan import DecodePlan, plan_decode
from halimede.kernels.gpu.attention_decode_reduce import arrive, finish, reduce_splits, store_part
from halimede.kernels.gpu.attention_decode_tile import attend_tile, load_block_ids, load_heads, slots_of
from halimede.kernels.launch import Variant, target_of
from halimede.kernels.spec import Fault, KernelSpec, Tensors
from halimede.kernels.target import Target, num_processors
from halimede.kernels.tuning import next_power_of_2, pick_config
from halimede.kernels.variant_key import Layout, layout

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _find_row(work_offsets_ptr, unit, num_rows):
    """The row whose splits hold the unit: the last with work_offsets[row] <= unit."""
    low, high = 0, num_rows
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(work_offsets_ptr + middle) <= unit
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit(do_not_specialize=["num_rows", "table_stride", "head_dim"])
def _attention_decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    block_tables_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    work_offsets_ptr,
    accumulators_ptr,
    statistics_ptr,
    counters_ptr,
    out_ptr,
    sinks_ptr,
    k_scale_ptr,
    v_scale_ptr,
    scale: tl.float32,
    softcap: tl.float32,
    num_rows,
    table_stride,
    head_dim,
    Q_STRIDE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    IN_FLOAT16: tl.constexpr,
    FLOAT8: tl.constexpr,
    NATIVE: tl.constexpr,
    WEIGHT_SCALE: tl.constexpr,
    FENCE_THREADS: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    REDUCE_M: tl.constexpr,
    TILE: tl.constexpr,
    PIECE: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Every num_programs-th item. An item is the number of a split, in the order of rows, * K + kv head."""
    heads = tl.arange(0, BLOCK_M)
    if k_scale_ptr is not None and not PER_TOKEN:
        scale *= tl.load(k_scale_ptr)
    num_items = tl.load(work_offsets_ptr + num_rows) * NUM_KV_HEADS
    for item in tl.range(tl.program_id(0), num_items, tl.num_programs(0)):
        unit, head = item // NUM_KV_HEADS, item % NUM_KV_HEADS
        row = _find_row(work_offsets_ptr, unit, num_rows)
        first_unit = tl.load(work_offsets_ptr + row)
        seq_len = tl.load(seq_lens_ptr + row)
        token = tl.load(query_start_loc_ptr + row).to(tl.int64)
        split_start = (unit - first_unit) * SPLIT
        begin = split_start
        if WINDOW > 0:
            first_visible = tl.maximum(seq_len - WINDOW, 0)
            split_start += first_visible // SPLIT * SPLIT
            begin = tl.maximum(split_start, first_visible)
        end = tl.minimum(split_start + SPLIT, seq_len)
        table_ptr = block_tables_ptr + row.to(tl.int64) * table_stride

        q_row = q_ptr + token * Q_STRIDE + head * (GROUP * HEAD_DIM)
        q0 = load_heads(q_row, heads, 0, D0, GROUP, HEAD_DIM)
        q1 = q0
        if D1 > 0:
            q1 = load_heads(q_row, heads, D0, D1, GROUP, HEAD_DIM)
        score_scale = tl.full([BLOCK_M], 1.0, tl.float32) * scale
        power = tl.full([BLOCK_M], 1.0, tl.float32)
        if IN_FLOAT16:
            # A head of q is divided by a power of two, so that float16 holds it as well as bfloat16 did.
            largest = tl.max(tl.abs(q0.to(tl.float32)), 1)
            if D1 > 0:
                largest = tl.maximum(largest, tl.max(tl.abs(q1.to(tl.float32)), 1))
            power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            power = tl.maximum(power, 1e-30)
            q0 = (q0.to(tl.float32) / power[:, None]).to(tl.float16)
            if D1 > 0:
                q1 = (q1.to(tl.float32) / power[:, None]).to(tl.float16)
            score_scale *= power
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M, TILE], tl.float32)
        acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
        acc1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 16], tl.float32)

        # The tiles that are seen in part, in one piece of code: where the window begins and the row ends.
        first_tile, last_tile = tl.cdiv(begin, TILE), end // TILE
        at_begin = (first_tile * TILE != begin).to(tl.int32)
        at_end = ((last_tile * TILE != end) & (last_tile >= first_tile)).to(tl.int32)
        for edge in tl.range(0, at_begin + at_end, num_stages=1):
            tile = tl.where(edge < at_begin, begin // TILE, last_tile)
            positions = tile * TILE + tl.arange(0, TILE)
            ids = load_block_ids(table_ptr, tile, end, BLOCK_SIZE, TILE, True)
            slots = slots_of(ids, head, tile, NUM_KV_HEADS, BLOCK_SIZE, TILE)
            row_max, row_sum, acc0, acc1 = attend_tile(
                q_row, q0, q1, power, row_max, row_sum, acc0, acc1,
                k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, slots,
                (positions >= begin) & (positions < end), score_scale, softcap, heads, head_dim, True,
                GROUP, HEAD_DIM, D0, D1, TILE, SOFTCAP, PER_TOKEN, FLOAT8, NATIVE, WEIGHT_SCALE,
                IN_FLOAT16, PIECE,
            )  # fmt: skip
        tile = tl.maximum(tl.minimum(first_tile, last_tile - 1), 0)  # there may be none
        ids = load_block_ids(table_ptr, tile, end, BLOCK_SIZE, TILE, True)
        for tile in tl.range(first_tile, last_tile, num_stages=STAGES):
            slots = slots_of(ids, head, tile, NUM_KV_HEADS, BLOCK_SIZE, TILE)
            ids = load_block_ids(table_ptr, tl.minimum(tile + 1, last_tile - 1), end, BLOCK_SIZE, TILE, False)
            row_max, row_sum, acc0, acc1 = attend_tile(
                q_row, q0, q1, power, row_max, row_sum, acc0, acc1,
                k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, slots,
                heads, score_scale, softcap, heads, head_dim, False,
                GROUP, HEAD_DIM, D0, D1, TILE, SOFTCAP, PER_TOKEN, FLOAT8, NATIVE, WEIGHT_SCALE,
                IN_FLOAT16, PIECE,
            )  # fmt: skip

        row_sum = tl.sum(row_sum, 1)
        # Read again, rather than held in registers through the loop.
        first_unit = tl.load(work_offsets_ptr + row)
        num_splits = tl.load(work_offsets_ptr + row + 1) - first_unit
        token = tl.load(query_start_loc_ptr + row).to(tl.int64)
        head = item % NUM_KV_HEADS
        out_row = out_ptr + (token * NUM_KV_HEADS + head) * (GROUP * HEAD_DIM)
        if num_splits == 1:
            finish(
                out_row, sinks_ptr, v_scale_ptr, head, heads, row_max, row_sum, acc0, acc1,
                GROUP, HEAD_DIM, D0, D1, PER_TOKEN, WEIGHT_SCALE,
            )  # fmt: skip
        else:
            first_slot = first_unit.to(tl.int64) * NUM_KV_HEADS + head
            slot = first_slot + (item // NUM_KV_HEADS - first_unit) * NUM_KV_HEADS
            part = accumulators_ptr + slot * (GROUP * HEAD_DIM)
            store_part(part, acc0, heads, 0, D0, GROUP, HEAD_DIM)
            if D1 > 0:
                store_part(part, acc1, heads, D0, D1, GROUP, HEAD_DIM)
            statistics = statistics_ptr + slot * (2 * GROUP) + heads
            tl.store(statistics, row_max, mask=heads < GROUP)
            tl.store(statistics + GROUP, row_sum, mask=heads < GROUP)
            counter = counters_ptr + row * NUM_KV_HEADS + head
            arrived = arrive(counter, part, GROUP * HEAD_DIM, FENCE_THREADS)
            if arrived == num_splits - 1:
                reduce_splits(
                    out_row, sinks_ptr, v_scale_ptr, accumulators_ptr, statistics_ptr, first_slot, num_splits,
                    head, NUM_KV_HEADS, GROUP, HEAD_DIM, D0, D1, PER_TOKEN, WEIGHT_SCALE,
                    REDUCE_M, CHUNK, STAGES,
                )  # fmt: skip
                tl.store(counter, 0)


def paged_attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    plan: DecodePlan,
    out: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Write the tokens of the rows that decode to out (T, H, D); arguments as in paged_attention_reference.

    plan: plan_decode's of this step. Raises KernelError for what the kernel does not take.
    """
    target, shape, num_rows = target_of(q), q.shape, seq_lens.shape[0]
    check_out(out, q, shape)
    variant = _variant(
        target,
        (q.dtype, shape[1:], q.stride()),
        (layout(k_cache), layout(v_cache)),
        (layout(k_scale), layout(v_scale)),
        layout(sinks),
        (sliding_window, softcap is not None),
        (plan.split_size, plan.sliding_window, plan.workspace.accumulators.shape[1:]),
    )
    check_step(num_rows, block_tables, query_start_loc, seq_lens, plan.work_offsets)
    programs = variant.config.options.get("programs_per_processor", 2) * num_processors(q.device)
    if k_cache.dtype == torch.float8_e4m3fn:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    workspace, constants = plan.workspace, variant.constants
    variant.start(
        (min(num_rows * plan.max_splits * constants["NUM_KV_HEADS"], programs),),
        *(q, k_cache, v_cache, block_tables, query_start_loc, seq_lens, plan.work_offsets),
        *(workspace.accumulators, workspace.statistics, workspace.counters),
        *(out, sinks, k_scale, v_scale),
        scale * _LOG2_E.value * (1 if softcap is None else 2 / softcap),
        (softcap or 0.0) * _LOG2_E.value,
        *(num_rows, block_tables.stride(0), constants["HEAD_DIM"]),
    )


@cache
def _variant(
    target: Target,
    q: tuple[torch.dtype, tuple[int, ...], tuple[int, ...]],
    caches: tuple[Layout, Layout],
    scales: tuple[Layout | None, Layout | None],
    sinks: Layout | None,
    options: tuple[int | None, bool],
    plan: tuple[int, int | None, tuple[int, ...]],
) -> Variant:
    """q: dtype, shape without T, strides. options: sliding_window, and whether there is a softcap.
    plan: split_size, sliding_window, shape of a slot. Checks all of them.
    """
    check_queries(*q)
    q_dtype, (heads, head_dim), strides = q
    check_caches(q_dtype, heads, head_dim, caches)
    cache_dtype, (_, kv_heads, block_size, _), _ = caches[0]
    (sliding_window, has_softcap), (split_size, planned_window, slot) = options, plan
    group = heads // kv_heads
    check_plan(sliding_window, planned_window, (group, head_dim), slot)
    check_options(heads, caches[0], sinks, scales)
    config = pick_config(
        "attention_decode",
        target,
        f"{q_dtype},{cache_dtype},{head_dim},{group},{block_size}",
        split_size,
        lambda: heuristic(target, q_dtype, cache_dtype, head_dim, group, block_size, split_size),
    )
    in_float16 = cache_dtype.itemsize == 1 and q_dtype != torch.float32
    per_token = scales[0] is not None and len(scales[0][1]) == 3
    return Variant(
        _attention_decode_kernel,
        config,
        WINDOW=sliding_window or 0,
        SPLIT=split_size,
        SOFTCAP=has_softcap,
        FENCE_THREADS=config.num_warps * target.warp_size if target.backend == "hip" else 0,
        Q_STRIDE=strides[0],
        NUM_KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        PER_TOKEN=per_token,
        IN_FLOAT16=in_float16,
        FLOAT8=cache_dtype == torch.float8_e4m3fn,
        NATIVE=target.native_e4m3,
        # Scales of a few thousandths would make small weights vanish in float16.
        WEIGHT_SCALE=1024.0 if per_token and (in_float16 or q_dtype == torch.float16) else 1.0,
        BLOCK_M=max(16, next_power_of_2(group)),
        REDUCE_M=next_power_of_2(group),
    )


def _run(
    *, q: torch.Tensor, k_cache: torch.Tensor, split_size: int, max_seq_len: int, **arguments: Any
) -> Tensors:
    """Plan and decode; tokens of other rows are 0. Returns the counters too."""
    plan = plan_decode(
        arguments["query_start_loc"],
        arguments["seq_lens"],
        num_heads=q.shape[1],
        num_kv_heads=k_cache.shape[1],
        head_dim=q.shape[2],
        max_seq_len=max_seq_len,
        sliding_window=arguments.get("sliding_window"),
        split_size=split_size,
    )
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    paged_attention_decode(q, k_cache, plan=plan, out=out, **arguments)
    return out, plan.workspace.counters


SPECS = (
    KernelSpec(
        name="attention_decode",
        summary="paged attention of rows with one query token, over splits of their KV",
        launcher=_run,
        reference=reference,
        tolerance="attention decode",
        cases=CASES,
        signatures=SIGNATURES,
        faults=(
            Fault("(positions < end)", "(positions < end + 1)"),
            Fault("(positions >= begin)", "(positions >= begin - 1)"),
            Fault("begin = tl.maximum(split_start, first_visible)", "begin = first_visible"),
            Fault("first_visible // SPLIT * SPLIT", "first_visible // SPLIT"),
            Fault("tl.store(statistics + GROUP, row_sum", "tl.store(statistics + GROUP, row_sum * 1.05"),
            Fault("arrived == num_splits - 1", "arrived == num_splits - 2"),
            Fault("tl.store(counter, 0)", "pass"),
            Fault("score_scale *= power", "pass"),
            Fault("scale *= tl.load(k_scale_ptr)", "scale *= tl.load(v_scale_ptr)"),
        ),
    ),
)
