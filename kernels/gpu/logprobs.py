"""Log-probabilities and ranks of given tokens and of the n most probable ones, without sorting the row.

In: logits (L, V) in the model's own dtype, token_ids (L) int64, optionally which rows (P) int32. Out, for
each of the P rows: the token's log-probability and rank (1 + how many logits are larger), and ids,
log-probabilities and ranks of the n largest logits, equal ones in order of token id; n is at most 128.

One program per row: one pass for the sum of exponentials and the rank, then rounds of sampling_select until
the n largest are among at most 128, which are put in order by comparing each with each. Reads the logits
about three times, once if n is 0; nothing of the size of the logits is written.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from halimede.errors import KernelError
from halimede.kernels.gpu.sampling_select import (
    LN_2,
    LOG2_E,
    STAGES,
    collect,
    load_logits,
    nth_equal,
    order_image,
    row_config,
    search,
)
from halimede.kernels.launch import launch, target_of
from halimede.kernels.spec import Case, Fault, KernelSpec, Tensors, Work
from halimede.kernels.tuning import pick_config

_SMALL_COUNT = 32
LARGEST_COUNT = 128
LIMITS = (_SMALL_COUNT, LARGEST_COUNT)
"""Of how many tokens there is a kernel; one for 0 besides."""


@triton.jit
def _append_impossible(row_ptr, out_ptr, found, LIMIT: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Copy the tokens of logit -inf to out_ptr after the `found` others, as `collect` does."""
    for start in range(0, SIZE, BLOCK):
        x, ids = load_logits(row_ptr, start, SIZE, BLOCK)
        impossible = (x == float("-inf")) & (ids < SIZE)
        place = found + tl.cumsum(impossible.to(tl.int32), axis=0) - 1
        mask = impossible & (place < LIMIT)
        tl.store(out_ptr + place, x.to(tl.int32, bitcast=True), mask=mask)
        tl.store(out_ptr + LIMIT + place, ids, mask=mask)
        found += tl.sum(impossible.to(tl.int32))
    tl.debug_barrier()
    return found


@triton.jit
def _write_in_order(found_ptr, out_ptr, found, n, log_total, LIMIT: tl.constexpr):
    """The n largest of `found` values and ids at found_ptr, as n ids, log-probabilities and ranks."""
    lanes = tl.arange(0, LIMIT)
    valid = lanes < found
    x = tl.load(found_ptr + lanes, mask=valid, other=-8388608).to(tl.float32, bitcast=True)
    ids = tl.load(found_ptr + LIMIT + lanes, mask=valid, other=0)
    image = order_image(x)
    key = (image.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)
    place = tl.zeros([LIMIT], tl.int32)
    rank = tl.full([LIMIT], 1, tl.int32)
    for start in range(0, found, 16):
        others = start + tl.arange(0, 16)
        known = others < found
        their_x = tl.load(found_ptr + others, mask=known, other=-8388608).to(tl.float32, bitcast=True)
        their_ids = tl.load(found_ptr + LIMIT + others, mask=known, other=0)
        their_image = order_image(their_x)
        their_key = (their_image.to(tl.int64) << 32) | (0x7FFFFFFF - their_ids).to(tl.int64)
        before = known[None, :] & (their_key[None, :] > key[:, None])
        place += tl.sum(before.to(tl.int32), axis=1)
        rank += tl.sum((their_image[None, :] > image[:, None]).to(tl.int32), axis=1)
    mask = valid & (place < n)
    tl.store(out_ptr + place, ids, mask=mask)
    tl.store(out_ptr + n + place, (x - log_total).to(tl.int32, bitcast=True), mask=mask)
    tl.store(out_ptr + 2 * n + place, rank, mask=mask)


@triton.jit(do_not_specialize=["n"])
def _logprobs_kernel(
    logits_ptr,
    token_ids_ptr,
    rows_ptr,
    out_ptr,
    kept_ptr,
    n,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    PICKED: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row = place
    if PICKED:
        row = tl.load(rows_ptr + place).to(tl.int64)
    row_ptr = logits_ptr + row * STRIDE
    out_ptr += place * (2 + 3 * n)
    # A row without a token has a negative code there.
    token = tl.maximum(tl.load(token_ids_ptr + row), 0)
    own = tl.load(row_ptr + token).to(tl.float32)

    # Finite, so that the difference to -inf is.
    largest = tl.full([BLOCK], -3.4028234663852886e38, tl.float32)
    smallest = tl.full([BLOCK], float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    larger = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, SIZE, BLOCK, num_stages=STAGES):
        x, _ = load_logits(row_ptr, start, SIZE, BLOCK)
        change = (x - largest) * LOG2_E
        factor = tl.exp2(-tl.abs(change))
        total = tl.where(change > 0.0, total * factor + 1.0, total + factor)
        largest = tl.maximum(largest, x)
        smallest = tl.minimum(smallest, tl.where(x > float("-inf"), x, float("inf")))
        larger += (x > own).to(tl.int32)
    peak = tl.max(largest, axis=0)
    total = tl.sum(total * tl.exp2((largest - peak) * LOG2_E), axis=0)
    log_total = peak + tl.log2(total) * LN_2
    tl.store(out_ptr, (own - log_total).to(tl.int32, bitcast=True))
    tl.store(out_ptr + 1, 1 + tl.sum(larger, axis=0))
    if LIMIT > 0:
        kept_ptr += place * (2 * BLOCK + 2 * LIMIT)
        found_ptr = kept_ptr + 2 * BLOCK
        bottom = tl.minimum(tl.min(smallest, axis=0), peak)
        zero, none = tl.full((), 0.0, tl.float32), tl.full((), -1, tl.int32)
        least, _, _, count, above, num_kept = search(
            row_ptr, kept_ptr, none, bottom, bottom, peak, zero, zero, n.to(tl.float32), LIMIT, SIZE, BLOCK
        )
        last = SIZE
        if count > LIMIT:
            last = nth_equal(row_ptr, kept_ptr, num_kept, least, LIMIT - above, SIZE, BLOCK)
        found = collect(row_ptr, kept_ptr, num_kept, found_ptr, least, last, LIMIT, SIZE, BLOCK)
        if found < n:
            found = _append_impossible(row_ptr, found_ptr, found, LIMIT, SIZE, BLOCK)
        _write_in_order(found_ptr, out_ptr + 2, tl.minimum(found, LIMIT), n, log_total, LIMIT)


def packed_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, n: int, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """What the module's docstring says as one int32 tensor (P, 2 + 3 n), to be copied at once.

    logits (L, V), any float dtype, unit stride in V; token_ids (L) int64, negative ones taken for 0; rows (P)
    int32, None for all L in order; n from 0 to 128. Columns: see unpack_logprobs.
    """
    size = logits.shape[1]
    if logits.stride(1) != 1 or token_ids.shape != logits.shape[:1] or not 0 <= n <= LARGEST_COUNT:
        raise KernelError(
            f"packed_logprobs takes logits (L, V) with unit stride, L tokens, n up to {LARGEST_COUNT}; got "
            f"{tuple(logits.shape)} with strides {logits.stride()}, {tuple(token_ids.shape)} and {n}"
        )
    n = min(n, size)
    num_rows = len(logits) if rows is None else len(rows)
    limit = 0 if n == 0 else _SMALL_COUNT if n <= _SMALL_COUNT else LARGEST_COUNT
    target = target_of(logits)
    config = pick_config("packed_logprobs", target, f"{logits.dtype}", size, lambda: row_config(size, target))
    assert size < 1024 * config.blocks["BLOCK"], "more blocks than counts have room for"
    out = torch.empty(num_rows, 2 + 3 * n, dtype=torch.int32, device=logits.device)
    scratch = 2 * (config.blocks["BLOCK"] + limit) if limit else 4
    launch(
        _logprobs_kernel,
        (num_rows,),
        logits,
        token_ids,
        token_ids if rows is None else rows,
        out,
        torch.empty(num_rows, scratch, dtype=torch.int32, device=logits.device),
        n,
        config=config,
        SIZE=size,
        STRIDE=logits.stride(0),
        PICKED=rows is not None,
        LIMIT=limit,
    )
    return out


def unpack_logprobs(packed: torch.Tensor) -> Tensors:
    """Views of a packed (P, 2 + 3 n): the token's log-probability float32 and rank (P); ids,
    log-probabilities float32 and ranks (P, n) of the n largest."""
    n = (packed.shape[1] - 2) // 3
    floats = packed.view(torch.float32)
    top = packed[:, 2 : 2 + n], floats[:, 2 + n : 2 + 2 * n], packed[:, 2 + 2 * n :]
    return floats[:, 0], packed[:, 1], *top


def logprobs_reference(
    logits: torch.Tensor, token_ids: torch.Tensor, n: int, rows: torch.Tensor | None = None
) -> Tensors:
    """The columns of unpack_logprobs by a stable sort, in float64."""
    picked = torch.arange(len(logits)) if rows is None else rows.long()
    x, tokens = logits.double()[picked], token_ids[picked].clamp(min=0)[:, None]
    total = x.logsumexp(1, keepdim=True)
    own = x.gather(1, tokens)
    values, ids = x.sort(dim=1, descending=True, stable=True)
    values, ids = values[:, :n], ids[:, :n]
    ranks = 1 + (x[:, None, :] > values[:, :, None]).sum(2)
    logprobs = (own - total).float().squeeze(1), (values - total).float()
    return logprobs[0], 1 + (x > own).sum(1).int(), ids.int(), logprobs[1], ranks.int()


def _run(**arguments: Any) -> Tensors:
    return unpack_logprobs(packed_logprobs(**arguments))


def _case(
    name: str,
    shape: tuple[int, int],
    n: int,
    dtype: torch.dtype = torch.float32,
    *,
    rows: Sequence[int] | None = None,
    spread: float = 3.0,
    stride: int = 0,
    coarse: bool = False,
    impossible: int = 0,
) -> Case:
    """coarse: logits are integers, mostly 0. impossible: that many of each row are -inf."""

    def make(device: torch.device) -> dict[str, Any]:
        length, size = shape
        logits = (torch.randn(length, max(size, stride), device=device) * spread).to(dtype)[:, :size]
        if coarse:
            logits = logits.round()
        if impossible:
            logits[:, 5 : 5 + impossible] = -torch.inf
        tokens = torch.randint(-2, size, (length,), device=device)
        picked = None if rows is None else torch.tensor(rows, dtype=torch.int32, device=device)
        return {"logits": logits, "token_ids": tokens, "n": n, "rows": picked}

    return Case(name, make, Work(bytes=shape[0] * shape[1] * dtype.itemsize))


_BF16 = torch.bfloat16

SPECS = (
    KernelSpec(
        name="packed_logprobs",
        summary="log-probabilities and ranks of given and most probable tokens",
        launcher=_run,
        reference=logprobs_reference,
        tolerance="packed_logprobs",
        cases=(
            _case("own only", (5, 700), 0),
            _case("one", (3, 300), 1),
            _case("twenty, bfloat16", (4, 600), 20, _BF16),
            _case("forty, float16, rows apart", (3, 333), 40, torch.float16, stride=336),
            _case("128 of many", (2, 900), 128),
            _case("ties", (3, 500), 20, _BF16, spread=0.01),
            _case("few above many ties", (1, 300), 30, spread=0.35, coarse=True),
            _case("all equal", (2, 700), 32, spread=0.0),
            _case("picked rows", (6, 300), 5, rows=(4, 1, 5)),
            _case("all of a small vocabulary", (3, 19), 19),
            _case("impossible tokens", (2, 200), 40, impossible=180),
            _case("one token", (2, 1), 1),
            _case("no rows", (0, 40), 3),
        ),
        signatures=(
            _case("V 151936, n 0, bfloat16", (256, 151936), 0, _BF16),
            _case("V 128256, n 20, bfloat16", (256, 128256), 20, _BF16),
            _case("V 151936, n 5, float32, picked", (64, 151936), 5, rows=range(64)),
            _case("V 262144, n 100, bfloat16", (256, 262144), 100, _BF16),
        ),
        faults=(
            Fault("larger += (x > own)", "larger += (x >= own)"),
            Fault("total * factor + 1.0", "total * factor"),
            Fault("(0x7FFFFFFF - their_ids)", "their_ids"),
            Fault("place < n)", "place < n - 1)"),
            Fault("if count > LIMIT", "if count > SIZE"),
            Fault("if found < n", "if found < 0"),
        ),
    ),
)
