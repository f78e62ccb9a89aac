"""One tile of keys and values in decode attention: where it lies in the paged cache, and its two products.

A tile is TILE tokens of one row and kv head at a multiple of TILE. Where blocks hold whole tiles it is one
contiguous piece behind a scalar address, otherwise each token has its own. A head of HEAD_DIM elements is
taken as two parts, D0 and D1 (0: none), because shapes are powers of two: 80 is 64 + 32, the last
16 masked. A part is not less than 32, or warps would not be spread over the heads' dimensions.
"""

import triton
import triton.language as tl

from halimede.kernels.gpu.float8 import e4m3_to_float16


@triton.jit
def _load_part(
    cache_ptr,
    slots,
    visible,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Elements FIRST .. FIRST + SIZE - 1 of a tile's heads. slots: of its first token, or of each."""
    dims = FIRST + tl.arange(0, SIZE)[None, :]
    # In two steps: with a scalar base the offsets are constants of a thread.
    if len(slots.shape) == 0:
        pointers = (cache_ptr + slots * HEAD_DIM) + (tl.arange(0, TILE)[:, None] * HEAD_DIM + dims)
    else:
        pointers = (cache_ptr + slots * HEAD_DIM)[:, None] + dims
    if FIRST + SIZE > HEAD_DIM:
        if MASKED:
            codes = tl.load(pointers, mask=visible[:, None] & (dims < HEAD_DIM), other=0)
        else:
            codes = tl.load(pointers, mask=dims < HEAD_DIM, other=0)
    elif MASKED:
        codes = tl.load(pointers, mask=visible[:, None], other=0)
    else:
        codes = tl.load(pointers)
    return codes


@triton.jit
def _load_scales(scale_ptr, slots, visible, TILE: tl.constexpr, MASKED: tl.constexpr):
    """The scales [N, K, B] of a tile's tokens."""
    pointers = scale_ptr + slots
    if len(slots.shape) == 0:
        pointers = pointers + tl.arange(0, TILE)
    return tl.load(pointers, mask=visible, other=0.0) if MASKED else tl.load(pointers)


@triton.jit
def _decoded(codes, FLOAT8: tl.constexpr, NATIVE: tl.constexpr, DTYPE: tl.constexpr):
    """What a cache holds as DTYPE, exact: int8, bytes of float8, or DTYPE itself."""
    values = codes
    if FLOAT8:
        values = e4m3_to_float16(codes, NATIVE)
    elif codes.dtype == tl.int8:
        # 1024 + 128 + code as float16 has the code in its last bits; conversions from integers are slow.
        values = (codes.to(tl.uint8, bitcast=True).to(tl.uint16) ^ 0x6480).to(
            tl.float16, bitcast=True
        ) - 1152.0
    return values.to(DTYPE)


@triton.jit
def load_heads(
    pointer, rows, FIRST: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """A part of q's heads of one kv head, (GROUP, HEAD_DIM); rows beyond them are 0."""
    dims = FIRST + tl.arange(0, SIZE)[None, :]
    mask = rows[:, None] < GROUP
    if FIRST + SIZE > HEAD_DIM:
        mask &= dims < HEAD_DIM
    return tl.load(pointer + rows[:, None] * HEAD_DIM + dims, mask=mask, other=0)


@triton.jit
def _scores_in_pieces(
    q_row,
    power,
    rows,
    k_ptr,
    slots,
    visible,
    head_dim,
    MASKED: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    FLOAT8: tl.constexpr,
    NATIVE: tl.constexpr,
    IN_FLOAT16: tl.constexpr,
    PIECE: tl.constexpr,
):
    """q k^T with PIECE elements of a head at a time in registers; head_dim: HEAD_DIM, kept from unrolling."""
    scores = tl.zeros([rows.shape[0], TILE], tl.float32)
    for first in tl.range(0, head_dim, PIECE, num_stages=1):
        q = load_heads(q_row + first, rows, 0, PIECE, GROUP, HEAD_DIM)
        if IN_FLOAT16:
            q = (q.to(tl.float32) / power[:, None]).to(tl.float16)
        codes = _load_part(k_ptr + first, slots, visible, 0, PIECE, HEAD_DIM, TILE, MASKED)
        k = _decoded(codes, FLOAT8, NATIVE, q.dtype)
        scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
    return scores


@triton.jit
def attend_tile(
    q_row,
    q0,
    q1,
    power,
    row_max,
    row_sum,
    acc0,
    acc1,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    slots,
    visible,
    score_scale,
    softcap,
    rows,
    head_dim,
    MASKED: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    TILE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    FLOAT8: tl.constexpr,
    NATIVE: tl.constexpr,
    WEIGHT_SCALE: tl.constexpr,
    IN_FLOAT16: tl.constexpr,
    PIECE: tl.constexpr,
):
    """The running softmax after one more tile; products are in q's dtype. MASKED: `visible` says what counts.

    row_max (M) and scores are in units of log2(e). row_sum (M, TILE) is summed up at the end, because a sum
    over the tokens of a tile is a barrier. WEIGHT_SCALE: what weights carry besides their token's scale.
    PIECE: read q again, so many elements of a head at a time, instead of taking q0 and q1; 0: do not.
    """
    dtype: tl.constexpr = q0.dtype
    if PIECE > 0:
        scores = _scores_in_pieces(
            q_row, power, rows, k_ptr, slots, visible, head_dim,
            MASKED, GROUP, HEAD_DIM, TILE, FLOAT8, NATIVE, IN_FLOAT16, PIECE,
        )  # fmt: skip
    else:
        k0 = _decoded(_load_part(k_ptr, slots, visible, 0, D0, HEAD_DIM, TILE, MASKED), FLOAT8, NATIVE, dtype)
        scores = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if D1 > 0:
            k1 = _decoded(
                _load_part(k_ptr, slots, visible, D0, D1, HEAD_DIM, TILE, MASKED), FLOAT8, NATIVE, dtype
            )
            scores = tl.dot(q1, tl.trans(k1), scores, input_precision="ieee")
    if PER_TOKEN:
        scores *= _load_scales(k_scale_ptr, slots, visible, TILE, MASKED)[None, :]
    scores *= score_scale[:, None]
    if SOFTCAP:  # tanh(x) is 1 - 2 / (1 + e^2x)
        scores = softcap - 2 * softcap / (1 + tl.exp2(scores))
    if MASKED:
        scores = tl.where(visible[None, :], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    decay = tl.exp2(row_max - new_max)
    p = tl.exp2(scores - new_max[:, None])
    row_sum = row_sum * decay[:, None] + p
    if PER_TOKEN:
        p *= (_load_scales(v_scale_ptr, slots, visible, TILE, MASKED) * WEIGHT_SCALE)[None, :]
    p = p.to(dtype)
    v0 = _decoded(_load_part(v_ptr, slots, visible, 0, D0, HEAD_DIM, TILE, MASKED), FLOAT8, NATIVE, dtype)
    acc0 = tl.dot(p, v0, acc0 * decay[:, None], input_precision="ieee")
    if D1 > 0:
        v1 = _decoded(
            _load_part(v_ptr, slots, visible, D0, D1, HEAD_DIM, TILE, MASKED), FLOAT8, NATIVE, dtype
        )
        acc1 = tl.dot(p, v1, acc1 * decay[:, None], input_precision="ieee")
    return new_max, row_sum, acc0, acc1


@triton.jit
def slots_of(ids, head, tile, NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Where a tile's tokens lie in a cache [N, K, B], in 64 bits: a cache passes 2^31 elements."""
    rows = ids.to(tl.int64) * NUM_KV_HEADS + head
    if len(ids.shape) == 0:
        slots = rows * BLOCK_SIZE + tile * TILE % BLOCK_SIZE
    else:
        slots = rows * BLOCK_SIZE + (tile * TILE + tl.arange(0, TILE)) % BLOCK_SIZE
    return slots


@triton.jit
def load_block_ids(table_ptr, tile, end, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr):
    """The ids of the blocks that hold a tile: one, or one for each token where blocks are smaller."""
    if BLOCK_SIZE % TILE == 0:
        ids = tl.load(table_ptr + tile * TILE // BLOCK_SIZE)
    else:
        positions = tile * TILE + tl.arange(0, TILE)
        if MASKED:
            ids = tl.load(table_ptr + positions // BLOCK_SIZE, mask=positions < end, other=0)
        else:
            ids = tl.load(table_ptr + positions // BLOCK_SIZE)
    return ids
