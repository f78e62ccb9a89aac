"""What sampling parameters do to logits before a token is chosen: bias, penalties, forbidden tokens.

logits (S, V) float32, changed in place. bias: rows, token ids (C) int32 and values (C) float32, each pair
once. Penalties, of tokens that occur, C of them: x / repetition where x > 0, else x * repetition; then
x -= frequency * count + presence * (count > 0), count that of the output. Banned tokens: rows and token ids.
Masks: for rows (M) int32 a bitmask (M, ceil(V / 32)) int32, where bit t % 32 of word t // 32 allows token t
(xgrammar's layout). A forbidden logit becomes -inf, which bias and penalties would not change, so those go
first. flags (S) int32 say what was hidden: HIDES_BROKEN NaN or infinity, HIDES_FINITE a number.

One launch for each feature in use. Lists move 12 to 16 bytes an entry; a mask reads and writes its row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from halimede.errors import KernelError
from halimede.kernels.launch import launch, target_of
from halimede.kernels.spec import Case, Fault, KernelSpec, Tensors, Work
from halimede.kernels.tuning import KernelConfig

HIDES_BROKEN = 1
HIDES_FINITE = 2

_HIDES_BROKEN = tl.constexpr(HIDES_BROKEN)
_HIDES_FINITE = tl.constexpr(HIDES_FINITE)


@dataclass(frozen=True, slots=True)
class PenaltyLists:
    """rows, token_ids, counts (C) int32; repetition, frequency, presence (S) float32."""

    rows: torch.Tensor
    token_ids: torch.Tensor
    counts: torch.Tensor
    repetition: torch.Tensor
    frequency: torch.Tensor
    presence: torch.Tensor


@triton.jit(do_not_specialize=["num_entries"])
def _bias_kernel(
    logits_ptr, rows_ptr, ids_ptr, values_ptr, num_entries, STRIDE: tl.constexpr, BLOCK: tl.constexpr
):
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = entries < num_entries
    rows = tl.load(rows_ptr + entries, mask=mask, other=0).to(tl.int64)
    places = logits_ptr + rows * STRIDE + tl.load(ids_ptr + entries, mask=mask, other=0)
    values = tl.load(values_ptr + entries, mask=mask, other=0.0)
    tl.store(places, tl.load(places, mask=mask, other=0.0) + values, mask=mask)


@triton.jit(do_not_specialize=["num_entries"])
def _penalty_kernel(
    logits_ptr,
    rows_ptr,
    ids_ptr,
    counts_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    num_entries,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = entries < num_entries
    rows = tl.load(rows_ptr + entries, mask=mask, other=0)
    counts = tl.load(counts_ptr + entries, mask=mask, other=0).to(tl.float32)
    repetition = tl.load(repetition_ptr + rows, mask=mask, other=1.0)
    frequency = tl.load(frequency_ptr + rows, mask=mask, other=0.0)
    presence = tl.load(presence_ptr + rows, mask=mask, other=0.0)
    places = logits_ptr + rows.to(tl.int64) * STRIDE + tl.load(ids_ptr + entries, mask=mask, other=0)
    x = tl.load(places, mask=mask, other=0.0)
    x = tl.where(x > 0.0, x / repetition, x * repetition)
    x -= frequency * counts
    x -= tl.where(counts > 0.0, presence, 0.0)
    tl.store(places, x, mask=mask)


@triton.jit
def _hidden(x, hides):
    """The flags of the logits x that `hides` picks."""
    finite = (x - x) == 0.0
    broken = (x != x) | (x == float("inf"))
    return tl.where(hides & finite, _HIDES_FINITE, 0) | tl.where(hides & broken, _HIDES_BROKEN, 0)


@triton.jit(do_not_specialize=["num_entries"])
def _ban_kernel(
    logits_ptr, rows_ptr, ids_ptr, flags_ptr, num_entries, STRIDE: tl.constexpr, BLOCK: tl.constexpr
):
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = entries < num_entries
    rows = tl.load(rows_ptr + entries, mask=mask, other=0)
    places = logits_ptr + rows.to(tl.int64) * STRIDE + tl.load(ids_ptr + entries, mask=mask, other=0)
    x = tl.load(places, mask=mask, other=0.0)
    tl.atomic_or(flags_ptr + rows, _hidden(x, mask), mask=mask)
    tl.store(places, float("-inf"), mask=mask)


@triton.jit
def _mask_kernel(
    logits_ptr,
    rows_ptr,
    bitmask_ptr,
    flags_ptr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(1).to(tl.int64)
    row = tl.load(rows_ptr + place).to(tl.int64)
    words = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    allowed = tl.load(bitmask_ptr + place * WORDS + words, mask=words < WORDS, other=-1)
    # Where everything is allowed the logits are not even read.
    if tl.max((allowed != -1).to(tl.int32), axis=0) > 0:
        bits = tl.arange(0, 32)
        ids = words[:, None] * 32 + bits[None, :]
        hides = ((allowed[:, None] >> bits[None, :]) & 1) == 0
        x = tl.load(logits_ptr + row * STRIDE + ids, mask=ids < SIZE, other=float("-inf"))
        hidden = _hidden(x, hides)
        flags = tl.max(tl.max(hidden & _HIDES_BROKEN, axis=1), axis=0)
        flags |= tl.max(tl.max(hidden & _HIDES_FINITE, axis=1), axis=0)
        if flags != 0:
            tl.atomic_or(flags_ptr + row, flags)
            tl.store(logits_ptr + row * STRIDE + ids, tl.where(hides, float("-inf"), x), mask=ids < SIZE)


def adjust_logits(
    logits: torch.Tensor,
    *,
    bias: Tensors | None = None,
    penalties: PenaltyLists | None = None,
    masks: Tensors | None = None,
    banned: Tensors | None = None,
) -> torch.Tensor | None:
    """Change float32 logits (S, V), unit stride in V, in place; flags (S) int32 if a token can be forbidden.

    bias: (rows, token ids, values); masks: (rows, bitmask); banned: (rows, token ids). See the module's
    docstring.
    """
    if logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise KernelError(
            f"adjust_logits takes float32 logits with unit stride; got {logits.dtype} with strides "
            f"{logits.stride()}: use logits.float()"
        )
    if bias is not None:
        _launch_list(_bias_kernel, logits, *bias)
    if penalties is not None:
        p = penalties
        values = (p.counts, p.repetition, p.frequency, p.presence)
        _launch_list(_penalty_kernel, logits, p.rows, p.token_ids, *values)
    if masks is None and banned is None:
        return None
    flags = torch.zeros(len(logits), dtype=torch.int32, device=logits.device)
    if masks is not None:
        rows, bitmask = masks
        _launch_masks(logits, rows, bitmask, flags)
    if banned is not None:
        _launch_list(_ban_kernel, logits, *banned, flags)
    return flags


def _launch_list(kernel: Any, logits: torch.Tensor, rows: torch.Tensor, *lists: torch.Tensor) -> None:
    config = KernelConfig({"BLOCK": 256}, num_warps=256 // target_of(logits).warp_size, num_stages=1)
    grid = (triton.cdiv(len(rows), 256),)
    launch(kernel, grid, logits, rows, *lists, len(rows), config=config, STRIDE=logits.stride(0))


def _launch_masks(
    logits: torch.Tensor, rows: torch.Tensor, bitmask: torch.Tensor, flags: torch.Tensor
) -> None:
    size = logits.shape[1]
    words = -(-size // 32)
    if bitmask.shape != (len(rows), words) or bitmask.dtype != torch.int32 or not bitmask.is_contiguous():
        raise KernelError(
            f"a mask of {size} tokens for {len(rows)} rows is ({len(rows)}, {words}) int32, contiguous; got "
            f"{tuple(bitmask.shape)} {bitmask.dtype}"
        )
    block = 16 if size < 4096 else 128
    config = KernelConfig({"BLOCK": block}, num_warps=256 // target_of(logits).warp_size, num_stages=1)
    launch(
        _mask_kernel,
        (triton.cdiv(words, block), len(rows)),
        logits,
        rows,
        bitmask,
        flags,
        config=config,
        SIZE=size,
        STRIDE=logits.stride(0),
        WORDS=words,
    )


def pack_allowed(allowed: torch.Tensor) -> torch.Tensor:
    """The bitmask (M, ceil(V / 32)) int32 of allowed (M, V) bool; bits past V are 0."""
    rows, size = allowed.shape
    padded = torch.nn.functional.pad(allowed, (0, -size % 32)).view(rows, -1, 32).long()
    words = (padded << torch.arange(32, device=allowed.device)).sum(-1)
    return (words - ((words >> 31) << 32)).int()


def adjust_logits_reference(
    logits: torch.Tensor,
    *,
    bias: Tensors | None = None,
    penalties: PenaltyLists | None = None,
    masks: Tensors | None = None,
    banned: Tensors | None = None,
) -> torch.Tensor | None:
    """The same with torch, one feature after the other, in place."""
    if bias is not None:
        logits[bias[0].long(), bias[1].long()] += bias[2]
    if penalties is not None:
        p, rows = penalties, penalties.rows.long()
        x = logits[rows, p.token_ids.long()]
        x = torch.where(x > 0, x / p.repetition[rows], x * p.repetition[rows])
        x -= p.frequency[rows] * p.counts + p.presence[rows] * (p.counts > 0)
        logits[rows, p.token_ids.long()] = x
    if masks is None and banned is None:
        return None
    forbidden = torch.zeros(logits.shape, dtype=torch.bool)
    if masks is not None:
        ids = torch.arange(logits.shape[1])
        forbidden[masks[0].long()] |= (masks[1].long()[:, ids // 32] >> (ids % 32)) & 1 == 0
    if banned is not None:
        forbidden[banned[0].long(), banned[1].long()] = True
    broken = logits.isnan() | (logits == torch.inf)
    flags = (forbidden & broken).any(1) * HIDES_BROKEN + (forbidden & logits.isfinite()).any(1) * HIDES_FINITE
    logits.masked_fill_(forbidden, -torch.inf)
    return flags.int()


def _outputs(function: Callable[..., torch.Tensor | None]) -> Callable[..., Tensors]:
    def run(logits: torch.Tensor, features: tuple[str, ...], **lists: torch.Tensor) -> Tensors:
        given: dict[str, Any] = {}
        if "penalties" in features:
            names = ("repetition", "frequency", "presence")
            places = lists["rows"], lists["ids"], lists["counts"]
            given["penalties"] = PenaltyLists(*places, *(lists[name] for name in names))
        if "bias" in features:
            given["bias"] = lists["rows"], lists["ids"], lists["values"]
        if "banned" in features:
            given["banned"] = lists["rows"][::2].contiguous(), lists["ids"][::2].contiguous()
        if "masks" in features:
            given["masks"] = lists["masked"], lists["bitmask"]
        flags = function(logits, **given)
        # NaN equals nothing: a number in its place.
        logits = logits.nan_to_num(nan=12345.0, posinf=torch.inf, neginf=-torch.inf)
        return (logits,) if flags is None else (logits, flags)

    return run


_launcher = _outputs(adjust_logits)


def _run(logits: torch.Tensor, features: tuple[str, ...], **lists: torch.Tensor) -> Tensors:
    return _launcher(logits, features, **lists)


def _case(
    name: str,
    shape: tuple[int, int],
    *features: str,
    entries: int = 40,
    stride: int = 0,
    broken: bool = False,
) -> Case:
    """The lists name a fifth or so of all tokens; broken: rows of NaN, infinity and nothing but -infinity."""

    def make(device: torch.device) -> dict[str, Any]:
        rows, size = shape
        logits = (torch.randn(rows, max(size, stride), device=device) * 3)[:, :size]
        if broken:
            logits[0, ::3], logits[1, 1::3], logits[2] = torch.nan, torch.inf, -torch.inf
        places = torch.randperm(max(1, rows * size), device=device)[:entries]
        masked = torch.arange(0, rows, 2, dtype=torch.int32, device=device)
        bitmask = torch.randint(-(2**31), 2**31 - 1, (len(masked), -(-size // 32)), device=device).int()
        bitmask[-1:] = -1
        per_row = torch.rand(3, rows, device=device)
        return {
            "logits": logits,
            "features": features,
            "rows": (places // size).int(),
            "ids": (places % size).int(),
            "values": torch.randn(len(places), device=device) * 5,
            "counts": torch.randint(0, 3, (len(places),), device=device).int(),
            "repetition": per_row[0] + 0.6,
            "frequency": per_row[1] - 0.5,
            "presence": per_row[2] - 0.5,
            "masked": masked,
            "bitmask": bitmask,
        }

    return Case(name, make, Work(bytes=8 * shape[0] * shape[1] if "masks" in features else 16 * entries))


SPECS = (
    KernelSpec(
        name="sampling_adjust",
        summary="bias, penalties, banned tokens and grammar masks on logits",
        launcher=_run,
        reference=_outputs(adjust_logits_reference),
        tolerance="sampling_adjust",
        cases=(
            _case("bias", (3, 100), "bias"),
            _case("penalties", (5, 70), "penalties", entries=300),
            _case("banned", (4, 50), "banned"),
            _case("masks", (5, 1037), "masks"),
            _case("masks of one word", (3, 20), "masks", entries=1),
            _case("everything, rows apart", (6, 1000), "bias", "penalties", "banned", "masks", stride=1003),
            _case("broken", (6, 200), "banned", "masks", broken=True, entries=200),
            _case("one entry", (1, 1), "bias", "penalties", "banned", entries=1),
            _case("no entries", (2, 9), "bias", "penalties", "banned", entries=0),
        ),
        signatures=(
            _case("V 32000, lists", (64, 32000), "bias", "penalties", "banned"),
            _case("V 151936, lists and masks", (64, 151936), "bias", "penalties", "banned", "masks"),
            _case("V 262144, masks", (64, 262144), "masks"),
        ),
        faults=(
            Fault("x - x) == 0.0", "x - x) == 1.0"),
            Fault("(triton.cdiv(words, block), len(rows)),", "(words // block, len(rows)),"),
            Fault("x -= frequency * counts", "x -= frequency"),
            Fault("tl.where(x > 0.0, x / repetition", "tl.where(x < 0.0, x / repetition"),
            Fault("& 1) == 0\n        x = ", "& 1) != 0\n        x = "),
        ),
    ),
)
