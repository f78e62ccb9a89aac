"""What stands between the projection to q, k, v and attention, in one pass: RMSNorm over each head of q and
k, rotary position embedding of q and k, and the write of k and v to the paged KV cache.

    x = x / sqrt(mean(x^2) + eps) * weight                                       if there are weights
    y[a] = x[a] * cos[i] - x[b] * sin[i],  y[b] = x[b] * cos[i] + x[a] * sin[i]   if there are tables
    stored = y, or round(y / scale) with the scale given or max|y| / limit per token and head

for i < half and (a, b) = (i, i + half), or (2i, 2i + 1) interleaved; dimensions from 2 * half on do not turn.

Layouts: qkv (T, (H + 2K) * D) or (T, H + 2K, D), dense inside a token, q then k then v; cos, sin
(positions, half) float32, looked up here; caches [N, K, B, D] contiguous; slot_mapping (T), slot = block * B
+ offset. Reads and writes T * (H + 2K) * D elements.

A program takes ROWS heads of q, k or v, of one token or of several, so that models with one KV head fill it
too. The two of a pair are in one thread, so that only sums and maxima cross threads.

Everything is float32 until the one rounding to q's or the cache's dtype. kernels/norm.py rounds once more
between norm and rotation, if the weight has x's dtype. Of qkv only q is changed: nobody reads its k again.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from halimede.kernels.gpu import rotary_kv_cases as cases
from halimede.kernels.gpu.float8 import E4M3_MAX, float32_to_e4m3
from halimede.kernels.gpu.rotary_kv_checks import check_tokens
from halimede.kernels.gpu.rotary_kv_config import write_choice
from halimede.kernels.launch import Variant, target_of
from halimede.kernels.spec import Fault, KernelSpec, Tensors
from halimede.kernels.tuning import tuned_bucket
from halimede.kernels.variant_key import layout

INT8_MAX = tl.constexpr(127.0)
# For a head of zeros: neither the scale nor its inverse may be 0.
SMALLEST_MAX = tl.constexpr(1e-20)


@triton.jit
def _locate(tile, num_tokens, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Token and head of each of a tile's ROWS heads, and whether there is such a token."""
    rows = tile * ROWS + tl.arange(0, ROWS)
    tokens = (rows // HEADS).to(tl.int64)
    return tokens, rows % HEADS, tokens < num_tokens


@triton.jit
def _load_columns(starts, live, SIZE: tl.constexpr):
    """The first SIZE elements from each of the pointers `starts` [ROWS, 1], float32, zeros after them."""
    columns = tl.arange(0, triton.next_power_of_2(SIZE))[None, :]
    return tl.load(starts + columns, mask=live & (columns < SIZE), other=0.0).to(tl.float32)


@triton.jit
def _store_columns(starts, x, live, SIZE: tl.constexpr):
    columns = tl.arange(0, triton.next_power_of_2(SIZE))[None, :]
    tl.store(starts + columns, x, mask=live & (columns < SIZE))


@triton.jit
def _load_pairs(starts, live, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The first and the second of each pair that turns."""
    if INTERLEAVED:
        x = _load_columns(starts, live, 2 * HALF)
        first, second = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    else:
        first = _load_columns(starts, live, HALF)
        second = _load_columns(starts + HALF, live, HALF)
    return first, second


@triton.jit
def _store_head(starts, parts, live, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    first, second, rest = parts
    if HALF > 0:
        if INTERLEAVED:
            x = tl.reshape(tl.join(first, second), (first.shape[0], first.shape[1] * 2))
            _store_columns(starts, x, live, 2 * HALF)
        else:
            _store_columns(starts, first, live, HALF)
            _store_columns(starts + HALF, second, live, HALF)
    if HEAD_DIM > 2 * HALF:
        _store_columns(starts + 2 * HALF, rest, live, HEAD_DIM - 2 * HALF)


@triton.jit
def _turned_head(
    starts,
    tokens,
    live,
    tables,
    weight_ptr,
    eps,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
):
    """Both of the pairs and the rest of a head, normed and turned; those without elements repeat another."""
    REST: tl.constexpr = HEAD_DIM - 2 * HALF
    positions_ptr, cos_ptr, sin_ptr = tables
    squares = tl.zeros((starts.shape[0],), tl.float32)
    if HALF > 0:
        positions = tl.load(positions_ptr + tokens, mask=live, other=0)[:, None]
    live = live[:, None]
    if HALF > 0:
        first, second = _load_pairs(starts, live, HALF, INTERLEAVED)
        cos = _load_columns(cos_ptr + positions * HALF, live, HALF)
        sin = _load_columns(sin_ptr + positions * HALF, live, HALF)
    if REST > 0:
        rest = _load_columns(starts + 2 * HALF, live, REST)
    if NORM:
        # Every row loads the same: then no thread waits for another.
        weights = weight_ptr + 0 * tokens[:, None]
        if HALF > 0:
            squares += tl.sum(first * first + second * second, axis=1)
        if REST > 0:
            squares += tl.sum(rest * rest, axis=1)
        factor = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        if HALF > 0:
            first_weight, second_weight = _load_pairs(weights, live, HALF, INTERLEAVED)
            first, second = first * factor * first_weight, second * factor * second_weight
        if REST > 0:
            rest = rest * factor * _load_columns(weights + 2 * HALF, live, REST)
    if HALF > 0:
        first, second = first * cos - second * sin, second * cos + first * sin
    else:
        first, second = rest, rest
    if REST == 0:
        rest = first
    return first, second, rest


@triton.jit
def _quantized(x, inverse, CACHE: tl.constexpr, NATIVE: tl.constexpr):
    """x * inverse, rounded to nearest even and saturated, as bytes of float8_e4m3fn or as int8."""
    x = x * inverse
    if CACHE == "e4m3":
        stored = float32_to_e4m3(x, NATIVE)
    else:
        x = tl.minimum(tl.maximum(x, -INT8_MAX), INT8_MAX)
        # Adding 1.5 * 2^23 leaves the integer in the last bits, rounded by the hardware.
        stored = (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    return stored


@triton.jit
def _write_head(
    cache_ptr,
    scale_ptr,
    rows,
    write,
    parts,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CACHE: tl.constexpr,
    PER_HEAD: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Put heads of k or v at `rows` of a cache [N * K * B, D], where `write`."""
    first, second, rest = parts
    if CACHE == "float":
        dtype = cache_ptr.dtype.element_ty
        first, second, rest = first.to(dtype), second.to(dtype), rest.to(dtype)
    else:
        if PER_HEAD:
            largest = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), axis=1)
            largest = tl.maximum(largest, tl.max(tl.abs(rest), axis=1))
            scale = tl.maximum(largest, SMALLEST_MAX) / (E4M3_MAX if CACHE == "e4m3" else INT8_MAX)
            tl.store(scale_ptr + rows, scale, mask=write)
            inverse = (1.0 / scale)[:, None]
        else:
            inverse = 1.0 / tl.load(scale_ptr)
        first = _quantized(first, inverse, CACHE, NATIVE)
        second = _quantized(second, inverse, CACHE, NATIVE)
        rest = _quantized(rest, inverse, CACHE, NATIVE)
    starts = cache_ptr + (rows * HEAD_DIM)[:, None]
    _store_head(starts, (first, second, rest), write[:, None], HEAD_DIM, HALF, INTERLEAVED)


@triton.jit(do_not_specialize=["num_tokens"])
def _qk_norm_rotary_kv_write_kernel(
    qkv_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    slot_mapping_ptr,
    k_cache_ptr,
    v_cache_ptr,
    q_weight_ptr,
    k_weight_ptr,
    k_scale_ptr,
    v_scale_ptr,
    eps: tl.float32,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    CACHE: tl.constexpr,
    PER_HEAD: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Tiles of q first, unless q stays as it is, then of k, then of v."""
    tile, tables = tl.program_id(0), (positions_ptr, cos_ptr, sin_ptr)
    q_tiles = tl.cdiv(num_tokens * NUM_HEADS, ROWS) if NORM or HALF > 0 else 0
    if tile < q_tiles:
        tokens, heads, live = _locate(tile, num_tokens, NUM_HEADS, ROWS)
        starts = (qkv_ptr + tokens * TOKEN_STRIDE + heads * HEAD_DIM)[:, None]
        first, second, rest = _turned_head(
            starts, tokens, live, tables, q_weight_ptr, eps, HEAD_DIM, HALF, INTERLEAVED, NORM
        )
        dtype = qkv_ptr.dtype.element_ty
        q = (first.to(dtype), second.to(dtype), rest.to(dtype))
        _store_head(starts, q, live[:, None], HEAD_DIM, HALF, INTERLEAVED)
    else:
        kv_tile, kv_tiles = tile - q_tiles, tl.cdiv(num_tokens * NUM_KV_HEADS, ROWS)
        tokens, heads, live = _locate(kv_tile % kv_tiles, num_tokens, NUM_KV_HEADS, ROWS)
        starts = (qkv_ptr + tokens * TOKEN_STRIDE + (NUM_HEADS + heads) * HEAD_DIM)[:, None]
        slots = tl.load(slot_mapping_ptr + tokens, mask=live, other=-1)
        rows = (slots // BLOCK_SIZE * NUM_KV_HEADS + heads) * BLOCK_SIZE + slots % BLOCK_SIZE
        write = slots >= 0
        if kv_tile < kv_tiles:
            k = _turned_head(
                starts, tokens, live, tables, k_weight_ptr, eps, HEAD_DIM, HALF, INTERLEAVED, NORM
            )
            _write_head(
                k_cache_ptr, k_scale_ptr, rows, write, k, HEAD_DIM, HALF, INTERLEAVED, CACHE, PER_HEAD, NATIVE
            )
        else:
            v = _load_columns(starts + NUM_KV_HEADS * HEAD_DIM, live[:, None], HEAD_DIM)
            _write_head(
                v_cache_ptr, v_scale_ptr, rows, write, (v, v, v), HEAD_DIM, 0, False, CACHE, PER_HEAD, NATIVE
            )


def qk_norm_rotary_kv_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    interleaved: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Norm and turn q in place; norm and turn k, write it and v to their slots. KernelError for wrong shapes.

    qkv: (T, (H + 2K) * D) or (T, H + 2K, D), any stride between tokens; its k and v are only read.
    positions, slot_mapping: (T) int64; a token whose slot is negative is not written, but its q is turned.
    cos, sin: (positions, half) float32, or both None. interleaved: pairs are neighbours, not halves.
    q_weight, k_weight: (D) of qkv's dtype or float32, or both None; eps is that of their norm.
    k_cache, v_cache: [N, K, B, D], of any 16 or 32 bit float; or float8_e4m3fn or int8, which need k_scale
    and v_scale float32: those of shape (1) are used, those [N, K, B] are written.
    """
    target, shape = target_of(qkv), qkv.shape
    num_tokens = shape[0] if shape else 0
    variant = _variant(
        target,
        tuned_bucket("qk_norm_rotary_kv_write", target, num_tokens),
        (qkv.dtype, shape[1:], qkv.stride()),
        (num_heads, num_kv_heads),
        (layout(k_cache), layout(v_cache)),
        (layout(k_scale), layout(v_scale)),
        (layout(cos), layout(sin), interleaved),
        (layout(q_weight), layout(k_weight)),
    )
    check_tokens(positions, slot_mapping, num_tokens)
    rows = variant.constants["ROWS"]
    tiles = 2 * -(-num_tokens * num_kv_heads // rows)
    if cos is not None or q_weight is not None:
        tiles += -(-num_tokens * num_heads // rows)
    caches = _storage(k_cache), _storage(v_cache)
    weights_and_scales = q_weight, k_weight, k_scale, v_scale
    variant.start(
        (tiles,), qkv, positions, cos, sin, slot_mapping, *caches, *weights_and_scales, eps, num_tokens
    )


def _storage(cache: torch.Tensor) -> torch.Tensor:
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


@cache
def _variant(*facts: Any) -> Variant:
    """facts: write_choice's arguments."""
    config, constants = write_choice(*facts)
    return Variant(_qk_norm_rotary_kv_write_kernel, config, **constants)


def _run(**given: Any) -> Tensors:
    qk_norm_rotary_kv_write(**given)
    return cases.outputs(given)


def _run_quantized(**given: Any) -> Tensors:
    qk_norm_rotary_kv_write(**given)
    return cases.outputs_in_steps(given)


SPECS = (
    KernelSpec(
        name="qk_norm_rotary_kv_write",
        summary="norm of q's and k's heads, rotary embedding, write to the KV cache, in one pass",
        launcher=_run,
        reference=cases.reference,
        tolerance="rotary_kv",
        cases=cases.CASES,
        signatures=cases.SIGNATURES,
        faults=(
            Fault("second * cos + first * sin", "second * cos - first * sin"),
            Fault("squares / HEAD_DIM + eps", "squares / (2 * HALF + 1) + eps"),
            Fault("second * factor * second_weight", "second * factor * first_weight"),
            Fault("write = slots >= 0", "write, rows = slots >= -1, tl.maximum(rows, 0)"),
            Fault("tokens < num_tokens", "tokens < num_tokens - 1"),
            Fault("* BLOCK_SIZE + slots % BLOCK_SIZE", "* BLOCK_SIZE + (slots + 1) % BLOCK_SIZE"),
            Fault(
                "x = _load_columns(starts, live, 2 * HALF)", "x = _load_columns(starts + 1, live, 2 * HALF)"
            ),
        ),
    ),
    KernelSpec(
        name="qk_norm_rotary_kv_write_8bit",
        summary="the same with a KV cache of float8_e4m3fn or int8",
        launcher=_run_quantized,
        reference=cases.exact_in_steps,
        tolerance="rotary_kv_8bit",
        cases=cases.CASES_8BIT,
        signatures=cases.SIGNATURES_8BIT,
        faults=(
            Fault("(x + 12582912.0).to(tl.int32, bitcast=True)", "x.to(tl.int32)"),
            Fault(
                "tl.max(tl.maximum(tl.abs(first), tl.abs(second)), axis=1)", "tl.max(tl.abs(first), axis=1)"
            ),
            Fault("E4M3_MAX if CACHE", "INT8_MAX if CACHE"),
            Fault("inverse = 1.0 / tl.load(scale_ptr)", "inverse = tl.load(scale_ptr)"),
            Fault("tl.minimum(tl.maximum(x, -INT8_MAX), INT8_MAX)", "tl.maximum(x, -INT8_MAX)"),
            Fault("scale_ptr + rows, scale, mask=write", "scale_ptr + rows, scale * 1.001, mask=write"),
        ),
    ),
)
