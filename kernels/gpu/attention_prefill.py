"""Paged attention of rows with several query tokens: y = softmax(q k^T * scale + mask) v.

Layouts: q (T, H, D), strides (t, D, 1); caches [N, K, B, D] contiguous, the step's own keys and values in
them; block_tables (R, max_blocks), query_start_loc (R + 1), seq_lens (R), int32; out (T, H, D) contiguous.
The last query token of a row is its sequence's last token; the others precede it.

One program takes BLOCK_Q query tokens of a row with all query heads of one kv head, packed in the BLOCK_M
rows of its products, so a tile of keys is read once for the whole group. It walks over tiles of BLOCK_N keys
at multiples of BLOCK_N: those that a sliding window cuts, then whole ones without any mask, then those cut by
causality or the sequence's end. A tile that a token does not see at all changes nothing, bit for bit, so a
token's result does not depend on how its prompt was cut into steps or on the rows beside it.

V_PARTS > 1 cuts the columns of the output into as many programs, each with all the scores, for large heads on
GPUs with few registers.

4 * D * H FLOPs for each pair of a query token and a key that it sees; reads q once, and keys and values once
per program. Softmax is online in float32 with exp2; weights are rounded to q's dtype for the second product.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from halimede.kernels.gpu.attention_prefill_cases import CASES, SIGNATURES, reference
from halimede.kernels.gpu.attention_prefill_checks import check_numbers, check_out, check_step
from halimede.kernels.gpu.attention_prefill_config import prefill_choice
from halimede.kernels.gpu.attention_tiles import find_row, load_blocks, load_tile
from halimede.kernels.launch import Variant, target_of
from halimede.kernels.spec import Fault, KernelSpec, Tensors
from halimede.kernels.tuning import tuned_bucket
from halimede.kernels.variant_key import layout

_LOG2_E = tl.constexpr(1.4426950408889634)
# Finite, so that the difference of two such maxima is 0 and not NaN: a tile may be hidden from a token.
_NO_SCORE = tl.constexpr(-1.0e30)


@triton.jit
def _attend(
    acc,
    acc_rest,
    row_max,
    row_sum,
    q,
    q_rest,
    q_pieces,
    is_query,
    head_dim,
    positions,
    first,
    last,
    kv_head,
    first_column,
    window,
    multiplier,
    cap_factor,
    table_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    SCALE_PER_TOKEN: tl.constexpr,
    NATIVE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    V_MAIN: tl.constexpr,
    V_REST: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Online softmax over the tiles of the keys first .. last - 1; first is a multiple of BLOCK_N.

    A head of MAIN + REST elements is two products, because blocks are powers of two; of the values only
    V_MAIN + V_REST columns are taken, from first_column on. MASKED: whether the window, causality or the
    sequence's end may cut a tile. row_max is in units of 1 / multiplier, so that scaling and subtraction are
    one instruction. PIECE: read so many elements of q's heads at a time from q_pieces, again for every tile,
    rather than hold them in registers; 0: do not. head_dim keeps the compiler from unrolling that loop.
    """
    HEAD_DIM: tl.constexpr = MAIN + REST
    lanes = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, MAIN)[None, :]
    columns_rest = MAIN + tl.arange(0, max(REST, 16))[None, :]
    v_columns = first_column + tl.arange(0, V_MAIN)[None, :]
    v_columns_rest = V_MAIN + tl.arange(0, max(V_REST, 16))[None, :]
    block = load_blocks(table_ptr, first, last, BLOCK_SIZE, BLOCK_N)
    for start in tl.range(first, last, BLOCK_N):
        # One tile ahead, so that nothing waits for it.
        next_block = load_blocks(table_ptr, start + BLOCK_N, last, BLOCK_SIZE, BLOCK_N)
        keys = start + lanes
        is_used, is_loaded = None, None
        if MASKED:
            is_used = keys < last
            is_loaded = is_used[:, None]
        if BLOCK_SIZE >= BLOCK_N:
            slot = (block.to(tl.int64) * KV_HEADS + kv_head) * BLOCK_SIZE + start % BLOCK_SIZE
            slots = lanes
        else:
            slot = 0
            slots = (block.to(tl.int64) * KV_HEADS + kv_head) * BLOCK_SIZE + keys % BLOCK_SIZE
        offsets = slots[:, None] * HEAD_DIM
        k_tile = k_ptr + slot * HEAD_DIM + offsets
        v_tile = v_ptr + slot * HEAD_DIM + offsets
        block = next_block

        if PIECE:
            scores = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
            for piece in tl.range(0, head_dim, PIECE, num_stages=1):
                q_piece = tl.load(q_pieces + piece, mask=is_query[:, None], other=0.0)
                k_piece = k_tile + piece + tl.arange(0, PIECE)[None, :]
                k = load_tile(k_piece, is_loaded, q.dtype, NATIVE)
                scores = tl.dot(q_piece, tl.trans(k), scores, input_precision="ieee")
        else:
            k = load_tile(k_tile + columns, is_loaded, q.dtype, NATIVE)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if REST and not PIECE:
            k = load_tile(k_tile + columns_rest, is_loaded, q.dtype, NATIVE)
            scores = tl.dot(q_rest, tl.trans(k), scores, input_precision="ieee")
        if SCALE_PER_TOKEN:
            k_scale = tl.load(k_scale_ptr + slot + slots, mask=is_used, other=0.0 if MASKED else None)
            scores = scores * k_scale[None, :]
        if cap_factor is not None:
            scores = 1.0 - 2.0 / (tl.exp2(scores * cap_factor) + 1.0)
        if MASKED:
            is_seen = keys[None, :] <= positions[:, None] if CAUSAL else (keys < last)[None, :]
            if window is not None:
                is_seen = is_seen & (keys[None, :] > positions[:, None] - window)
            scores = tl.where(is_seen, scores, float("-inf"))

        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        weights = tl.exp2(scores * multiplier - (new_max * multiplier)[:, None])
        shrink = tl.exp2((row_max - new_max) * multiplier)
        row_sum = row_sum * shrink + tl.sum(weights, axis=1)
        row_max = new_max
        if SCALE_PER_TOKEN:
            v_scale = tl.load(v_scale_ptr + slot + slots, mask=is_used, other=0.0 if MASKED else None)
            weights = weights * v_scale[None, :]
        weights = weights.to(q.dtype)
        v = load_tile(v_tile + v_columns, is_loaded, q.dtype, NATIVE)
        acc = tl.dot(weights, v, acc * shrink[:, None], input_precision="ieee")
        if V_REST:
            v = load_tile(v_tile + v_columns_rest, is_loaded, q.dtype, NATIVE)
            acc_rest = tl.dot(weights, v, acc_rest * shrink[:, None], input_precision="ieee")
    return acc, acc_rest, row_max, row_sum


@triton.jit(do_not_specialize=["num_rows", "max_blocks", "min_query_len", "window", "head_dim"])
def _prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    sinks_ptr,
    block_tables_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    out_ptr,
    multiplier,
    cap_factor,
    num_rows,
    max_blocks,
    min_query_len,
    window,
    head_dim,
    Q_STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    SCALE_PER_TENSOR: tl.constexpr,
    SCALE_PER_TOKEN: tl.constexpr,
    NATIVE: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    V_PARTS: tl.constexpr,
    PIECE: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    HEAD_DIM: tl.constexpr = MAIN + REST
    V_MAIN: tl.constexpr = MAIN if V_PARTS == 1 else HEAD_DIM // V_PARTS
    V_REST: tl.constexpr = REST if V_PARTS == 1 else 0
    # Backwards: the last tokens of a row see the most keys, and what takes longest should start first.
    query_block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    first_column = 0 if V_PARTS == 1 else tl.program_id(2) * V_MAIN
    row = find_row(query_start_loc_ptr, query_block, num_rows, BLOCK_Q)
    row_start = tl.load(query_start_loc_ptr + row)
    query_len = tl.load(query_start_loc_ptr + row + 1) - row_start
    first_query = (query_block - row_start // BLOCK_Q - row) * BLOCK_Q
    if (first_query >= query_len) | (query_len < min_query_len):
        return
    seq_len = tl.load(seq_lens_ptr + row)

    # Addresses are scalars plus offsets of 32 bits, and masks one bound, to be cheap to hold or to repeat.
    first_token = row_start + first_query
    lanes = tl.arange(0, BLOCK_M)
    is_query = lanes < tl.minimum(query_len - first_query, BLOCK_Q) * GROUP
    q_base = q_ptr + first_token.to(tl.int64) * Q_STRIDE + kv_head * (GROUP * HEAD_DIM)
    q_offsets = (lanes // GROUP * Q_STRIDE + lanes % GROUP * HEAD_DIM)[:, None]
    q_pieces = q_base + (q_offsets + tl.arange(0, PIECE if PIECE else 16)[None, :])
    if PIECE:
        q = tl.zeros([BLOCK_M, 16], q_ptr.dtype.element_ty)
    else:
        q = tl.load(q_base + (q_offsets + tl.arange(0, MAIN)[None, :]), mask=is_query[:, None], other=0.0)
    q_rest = q
    if REST and not PIECE:
        columns = MAIN + tl.arange(0, REST)[None, :]
        q_rest = tl.load(q_base + (q_offsets + columns), mask=is_query[:, None], other=0.0)

    if SCALE_PER_TENSOR:
        if cap_factor is None:
            multiplier *= tl.load(k_scale_ptr)
        else:
            cap_factor *= tl.load(k_scale_ptr)

    row_max = tl.full([BLOCK_M], _NO_SCORE, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:
        sinks = tl.load(sinks_ptr + kv_head * GROUP + lanes % GROUP, mask=is_query, other=0.0)
        row_max = sinks * _LOG2_E / multiplier
        row_sum += 1.0
    acc = tl.zeros([BLOCK_M, V_MAIN], tl.float32)
    acc_rest = tl.zeros([BLOCK_M, max(V_REST, 16)], tl.float32)

    positions = seq_len - query_len + first_query + lanes // GROUP
    first_position = seq_len - query_len + first_query
    last_position = tl.minimum(first_position + BLOCK_Q, seq_len) - 1
    table_ptr = block_tables_ptr + row.to(tl.int64) * max_blocks
    # Keys first .. last - 1 are seen by some query, whole_first .. whole_last - 1 by all of them.
    last = seq_len
    whole_last = seq_len // BLOCK_N * BLOCK_N
    if CAUSAL:
        last = last_position + 1
        whole_last = (first_position + 1) // BLOCK_N * BLOCK_N
    first, whole_first = 0, 0
    if window is not None:
        first = tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
        whole_first = tl.cdiv(tl.maximum(last_position - window + 1, 0), BLOCK_N) * BLOCK_N
    for phase in tl.static_range(1 if window is None else 0, 3):
        if phase == 0:
            begin, end = first, tl.minimum(whole_first, last)
        elif phase == 1:
            begin, end = whole_first, whole_last
        else:
            begin, end = tl.maximum(whole_first, whole_last), last
        acc, acc_rest, row_max, row_sum = _attend(
            acc,
            acc_rest,
            row_max,
            row_sum,
            q,
            q_rest,
            q_pieces,
            is_query,
            head_dim,
            positions,
            begin,
            end,
            kv_head,
            first_column,
            window,
            multiplier,
            cap_factor,
            table_ptr,
            k_ptr,
            v_ptr,
            k_scale_ptr,
            v_scale_ptr,
            MASKED=phase != 1,
            CAUSAL=CAUSAL,
            SCALE_PER_TOKEN=SCALE_PER_TOKEN,
            NATIVE=NATIVE,
            KV_HEADS=KV_HEADS,
            BLOCK_SIZE=BLOCK_SIZE,
            MAIN=MAIN,
            REST=REST,
            V_MAIN=V_MAIN,
            V_REST=V_REST,
            PIECE=PIECE,
            BLOCK_N=BLOCK_N,
        )

    out_factor = 1.0 / row_sum
    if SCALE_PER_TENSOR:
        out_factor = tl.load(v_scale_ptr) * out_factor
    out_base = out_ptr + (first_token.to(tl.int64) * KV_HEADS + kv_head) * (GROUP * HEAD_DIM)
    out_offsets = (lanes // GROUP * (KV_HEADS * GROUP * HEAD_DIM) + lanes % GROUP * HEAD_DIM)[:, None]
    columns = first_column + tl.arange(0, V_MAIN)[None, :]
    y = (acc * out_factor[:, None]).to(q.dtype)
    tl.store(out_base + (out_offsets + columns), y, mask=is_query[:, None])
    if V_REST:
        columns = V_MAIN + tl.arange(0, V_REST)[None, :]
        y = (acc_rest * out_factor[:, None]).to(q.dtype)
        tl.store(out_base + (out_offsets + columns), y, mask=is_query[:, None])


def paged_attention_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    min_query_len: int = 2,
) -> None:
    """Write to `out` (T, H, D) the attention of the rows that have at least min_query_len query tokens.

    The other rows' tokens in `out` stay as they are. Inputs as in paged_attention_reference; q may be a slice
    of a projection; 8-bit caches need k_scale and v_scale, (1) or [N, K, B]. KernelError for what is refused.
    """
    target, shape = target_of(q), q.shape
    check_out(out, q, shape)
    num_tokens = shape[0] if shape else 0
    variant = _variant(
        target,
        tuned_bucket("attention_prefill", target, num_tokens),
        (q.dtype, shape[1:], q.stride()),
        (layout(k_cache), layout(v_cache)),
        (layout(k_scale), layout(v_scale)),
        layout(sinks),
        (causal, sliding_window is not None, softcap is not None),
    )
    num_rows = check_step(block_tables, query_start_loc, seq_lens)
    check_numbers(scale, sliding_window, softcap)
    if num_tokens == 0 or num_rows == 0:
        return
    constants = variant.constants
    blocks = num_tokens // (constants["BLOCK_M"] // constants["GROUP"]) + num_rows
    if k_cache.dtype == torch.float8_e4m3fn:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    variant.start(
        (blocks, constants["KV_HEADS"], constants["V_PARTS"]),
        *(q, k_cache, v_cache, k_scale, v_scale, sinks, block_tables, query_start_loc, seq_lens, out),
        _LOG2_E.value * (scale if softcap is None else softcap),
        None if softcap is None else 2 * _LOG2_E.value * scale / softcap,
        *(num_rows, block_tables.stride(0), min_query_len, sliding_window, shape[2]),
    )


@cache
def _variant(*facts: Any) -> Variant:
    """facts: prefill_choice's arguments."""
    config, constants = prefill_choice(*facts)
    return Variant(_prefill_kernel, config, **constants)


def _run(**step: Any) -> Tensors:
    """As paged_attention_prefill, but `out` is made here and holds zeros for the rows left out."""
    out = torch.zeros_like(step["q"], memory_format=torch.contiguous_format)
    paged_attention_prefill(out=out, **step)
    return (out,)


SPECS = (
    KernelSpec(
        name="attention_prefill",
        summary="paged attention of rows with several query tokens",
        launcher=_run,
        reference=reference,
        tolerance="attention prefill",
        cases=CASES,
        signatures=SIGNATURES,
        faults=(
            Fault("keys[None, :] <= positions", "keys[None, :] < positions"),
            Fault("> positions[:, None] - window", ">= positions[:, None] - window"),
            Fault("(first_position + 1) // BLOCK_N", "(last_position + 1) // BLOCK_N"),
            Fault("tl.cdiv(tl.maximum(last_position", "tl.cdiv(tl.maximum(first_position"),
            Fault("row_sum * shrink + ", "row_sum + "),
            Fault("row_sum += 1.0", "row_sum += 0.0"),
            Fault("acc_rest * shrink[:, None]", "acc_rest"),
            Fault("weights = weights * v_scale[None, :]", "weights = weights * 1.0"),
            Fault("out_factor = tl.load(v_scale_ptr) * out_factor", "out_factor = out_factor * 1.0"),
            Fault("start + BLOCK_N, last, BLOCK_SIZE", "start, last, BLOCK_SIZE"),
            Fault("| (query_len < min_query_len)", "| (query_len < 2)"),
            Fault("is_used = keys < last", "is_used = keys <= last"),
        ),
        matrix_product=True,
    ),
)
