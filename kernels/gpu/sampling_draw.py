"""Chooses each row's token: the largest logit, or the largest of logit / temperature - log(noise).

noise ~ Exp(1) makes the latter a draw from softmax(logits / temperature) (the Gumbel-max trick). Its 32
random bits are those of kernels/random_stream.py: a function of seed, position and token id only.

In: logits (S, V), temperature (S) float32, 0 for the largest; keys (S, 2) int64, seed and position; cut and
last (S), see sampling_threshold; flags (S), see sampling_adjust. Out: tokens (S) int64, negative where there
is none: NOT_FINITE, ALL_FORBIDDEN. The vocabulary is split over programs; the largest (score, lowest id) of a
row is an integer that they share by an atomic maximum, which no order of theirs can change. The last one to
arrive writes the token and puts the workspace back as it was. Reads the logits once.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from halimede.errors import KernelError
from halimede.kernels.gpu.sampling_adjust import HIDES_BROKEN, HIDES_FINITE
from halimede.kernels.gpu.sampling_select import LN_2, load_logits, order_image
from halimede.kernels.launch import Variant, target_of
from halimede.kernels.random_stream import stream_keys, torch_bits
from halimede.kernels.spec import Case, Fault, KernelSpec, Tensors, Work
from halimede.kernels.target import Target
from halimede.kernels.tuning import KernelConfig, next_power_of_2, pick_config

NOT_FINITE = -1
ALL_FORBIDDEN = -2

_NOT_FINITE = tl.constexpr(NOT_FINITE)
_ALL_FORBIDDEN = tl.constexpr(ALL_FORBIDDEN)
_HIDES_BROKEN = tl.constexpr(HIDES_BROKEN)
_HIDES_FINITE = tl.constexpr(HIDES_FINITE)
_BLOCKS_A_PROGRAM = tl.constexpr(4)
_MINUS_INFINITY = tl.constexpr(-2139095041)  # its image
_BROKEN = tl.constexpr(0x7FFFFFFF)  # above every image of a number
_NOTHING = tl.constexpr(-0x7FFFFFFFFFFFFFFF)
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MULTIPLIER1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MULTIPLIER2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _mix(z):
    """SplitMix64's finalizer of uint64."""
    z = (z ^ (z >> 30)) * _MULTIPLIER1
    z = (z ^ (z >> 27)) * _MULTIPLIER2
    return z ^ (z >> 31)


@triton.jit
def stream_start(seed, position):
    """random_stream.stream_keys of an int64 seed and position: uint64."""
    seed, position = seed.to(tl.uint64, bitcast=True), position.to(tl.uint64, bitcast=True)
    return _mix(_mix(seed + _GAMMA) ^ position)


@triton.jit
def log_noise(start, ids):
    """The logarithm of random_stream.exponential_noise of int32 token ids."""
    bits = (_mix(ids.to(tl.uint64) * _GAMMA + start) >> 32).to(tl.uint32)
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # -log(1 - u): below 1/4 by 2 atanh(u / (2 - u)), because 1 - u has lost the last bits of u.
    s = u / (2.0 - u)
    t = s * s
    small = 2.0 * s * (1.0 + t * (0.33333334 + t * (0.2 + t * (0.14285715 + t * 0.11111111))))
    return tl.log2(tl.where(u < 0.25, small, tl.log2(1.0 - u) * -LN_2)) * LN_2


@triton.jit
def _perturb(x, ids, temperature, start, cut, last, FILTERED: tl.constexpr):
    """Logits as what the drawn token is the largest of; a greedy row's, of temperature 0, as they are."""
    if temperature > 0.0:
        if FILTERED:
            x = tl.where((x > cut) | ((x == cut) & (ids <= last)), x, float("-inf"))
        # Most blocks of a filtered row have nothing left, and noise is the costly part.
        if tl.max(x, axis=0) > float("-inf"):
            x = x / temperature - log_noise(start, ids)
    return x


@triton.jit(do_not_specialize=["num_splits"])
def _draw_kernel(
    logits_ptr,
    temperature_ptr,
    keys_ptr,
    cut_ptr,
    last_ptr,
    flags_ptr,
    tokens_ptr,
    best_ptr,
    arrived_ptr,
    num_splits,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    RANDOM: tl.constexpr,
    FILTERED: tl.constexpr,
    FLAGGED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if RANDOM:
        temperature = tl.load(temperature_ptr + row)
        start = stream_start(tl.load(keys_ptr + 2 * row), tl.load(keys_ptr + 2 * row + 1))
    cut, last = 0.0, 0
    if FILTERED:
        cut, last = tl.load(cut_ptr + row), tl.load(last_ptr + row)
    best = tl.full([BLOCK], _MINUS_INFINITY, tl.int32)
    best_ids = tl.zeros([BLOCK], tl.int32)
    for block in range(_BLOCKS_A_PROGRAM):
        x, ids = load_logits(
            logits_ptr + row * STRIDE, (split * _BLOCKS_A_PROGRAM + block) * BLOCK, SIZE, BLOCK
        )
        broken = (x != x) | (x == float("inf"))
        if RANDOM:
            x = _perturb(x, ids, temperature, start, cut, last, FILTERED)
        image = tl.where(broken, _BROKEN, order_image(x))
        best_ids = tl.where(image > best, ids, best_ids)
        best = tl.maximum(best, image)
    # Of equal images the lower id is the larger integer.
    largest = tl.max((best.to(tl.int64) << 32) | (0x7FFFFFFF - best_ids).to(tl.int64), axis=0)
    tl.atomic_max(best_ptr + row, largest)
    if tl.atomic_add(arrived_ptr + row, 1) == num_splits - 1:
        tl.atomic_xchg(arrived_ptr + row, 0)
        largest = tl.atomic_xchg(best_ptr + row, _NOTHING)
        image = largest >> 32
        token = 0x7FFFFFFF - (largest & 0x7FFFFFFF)
        nothing = _NOT_FINITE
        unsound = image == _BROKEN
        if FLAGGED:
            flags = tl.load(flags_ptr + row)
            unsound = unsound | ((flags & _HIDES_BROKEN) != 0)
            nothing = tl.where((flags & _HIDES_FINITE) != 0, _ALL_FORBIDDEN, _NOT_FINITE)
        token = tl.where(image == _MINUS_INFINITY, nothing, token)
        tl.store(tokens_ptr + row, tl.where(unsound, _NOT_FINITE, token))


@dataclass(frozen=True, slots=True)
class DrawWorkspace:
    """What the programs of a row share: best int64 and arrived int32, of at least S. Every launch leaves it
    as it found it, so one serves all launches of a stream."""

    best: torch.Tensor
    arrived: torch.Tensor


def make_draw_workspace(rows: int, device: torch.device) -> DrawWorkspace:
    """A workspace for up to `rows` rows."""
    best = torch.full((rows,), _NOTHING.value, dtype=torch.int64, device=device)
    return DrawWorkspace(best, torch.zeros(rows, dtype=torch.int32, device=device))


def draw_tokens(
    logits: torch.Tensor,
    workspace: DrawWorkspace,
    *,
    temperature: torch.Tensor | None = None,
    keys: torch.Tensor | None = None,
    threshold: tuple[torch.Tensor, torch.Tensor] | None = None,
    flags: torch.Tensor | None = None,
) -> torch.Tensor:
    """Tokens (S) int64 of logits (S, V) in any float dtype, unit stride in V; see the module's docstring.

    temperature and keys: None if no row draws. threshold: (cut, last), None if no row is filtered.
    """
    _check(logits, workspace, (temperature, keys), (flags, *(threshold or ())))
    rows, size = logits.shape
    variant = _variant(
        target_of(logits),
        logits.dtype,
        size,
        logits.stride(0),
        temperature is not None,
        threshold is not None and temperature is not None,
        flags is not None,
    )
    num_splits = -(-size // (variant.constants["BLOCK"] * _BLOCKS_A_PROGRAM.value))
    tokens = workspace.best.new_empty(rows)
    cut, last = (tokens, tokens) if threshold is None else threshold
    variant.start(
        (num_splits, rows),
        logits,
        tokens if temperature is None else temperature,
        tokens if keys is None else keys,
        cut,
        last,
        tokens if flags is None else flags,
        tokens,
        workspace.best,
        workspace.arrived,
        num_splits,
    )
    return tokens


@cache
def _variant(
    target: Target,
    dtype: torch.dtype,
    size: int,
    stride: int,
    random: bool,
    filtered: bool,
    flagged: bool,
) -> Variant:
    config = pick_config("sampling_draw", target, f"{dtype}", size, lambda: _heuristic(size, dtype, target))
    return Variant(
        _draw_kernel,
        config,
        SIZE=size,
        STRIDE=stride,
        RANDOM=random,
        FILTERED=filtered,
        FLAGGED=flagged,
    )


def _check(
    logits: torch.Tensor,
    workspace: DrawWorkspace,
    drawing: tuple[torch.Tensor | None, ...],
    others: tuple[torch.Tensor | None, ...],
) -> None:
    """drawing: given together or not at all."""
    rows, given = logits.shape[0], [p for p in (*drawing, *others) if p is not None]
    alike = (drawing[0] is None) == (drawing[1] is None)
    if logits.stride(1) != 1 or workspace.best.shape[0] < rows or not alike:
        raise KernelError(
            f"draw_tokens takes logits (S, V) with unit stride, a workspace for S rows, temperature and keys "
            f"together; got {tuple(logits.shape)} with strides {logits.stride()}, a workspace for "
            f"{len(workspace.best)}"
        )
    if any(p.shape[0] != rows or not p.is_contiguous() for p in given):
        raise KernelError(
            f"draw_tokens takes contiguous parameters of {rows} rows; got {[tuple(p.shape) for p in given]} "
            f"with strides {[p.stride() for p in given]}"
        )


def _heuristic(size: int, dtype: torch.dtype, target: Target) -> KernelConfig:
    block = min(2048, max(64, next_power_of_2(-(-size // 16))))
    threads = min(256, max(128, block * dtype.itemsize // 16))
    return KernelConfig({"BLOCK": block}, num_warps=threads // target.warp_size, num_stages=1)


def draw_tokens_reference(
    logits: torch.Tensor,
    temperature: torch.Tensor | None,
    keys: torch.Tensor | None,
    threshold: tuple[torch.Tensor, torch.Tensor] | None,
    flags: torch.Tensor | None,
) -> torch.Tensor:
    """The same in float64."""
    scores, ids = logits.double(), torch.arange(logits.shape[1])
    broken = (scores.isnan() | (scores == torch.inf)).any(1)
    if temperature is not None and keys is not None:
        starts = stream_keys(keys.cpu().numpy(), ids.device)
        uniform = (torch_bits(starts[:, None], ids).double() + 0.5) * 2.0**-32
        drawn = scores / temperature[:, None] - torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))
        if threshold is not None:
            cut, last = threshold[0][:, None], threshold[1][:, None]
            drawn = drawn.where((scores > cut) | ((scores == cut) & ids.le(last)), -torch.inf)
        scores = drawn.where(temperature[:, None] > 0, scores)
    best = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).max(1).values
    tokens = (scores == best[:, None]).long().argmax(1)
    hidden = torch.zeros(len(logits), dtype=torch.int32) if flags is None else flags
    nothing = torch.where(hidden & HIDES_FINITE != 0, ALL_FORBIDDEN, NOT_FINITE)
    tokens = torch.where(best == -torch.inf, nothing, tokens)
    return torch.where(broken | (hidden & HIDES_BROKEN != 0), NOT_FINITE, tokens)


def _run(
    logits: torch.Tensor,
    temperature: torch.Tensor | None,
    keys: torch.Tensor | None,
    threshold: tuple[torch.Tensor, torch.Tensor] | None,
    flags: torch.Tensor | None,
) -> Tensors:
    workspace = make_draw_workspace(len(logits) + 1, logits.device)
    tokens = draw_tokens(
        logits, workspace, temperature=temperature, keys=keys, threshold=threshold, flags=flags
    )
    return tokens, workspace.best, workspace.arrived


def _reference(logits: torch.Tensor, **arguments: Any) -> Tensors:
    fresh = make_draw_workspace(len(logits) + 1, logits.device)
    return draw_tokens_reference(logits, **arguments), fresh.best, fresh.arrived


def _case(
    name: str,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    *,
    random: bool = True,
    filtered: bool = False,
    flagged: bool = False,
    spread: float = 1.0,
    stride: int = 0,
    broken: bool = False,
) -> Case:
    """broken: NaN in row 0, infinity in row 1, nothing but -infinity in rows 2 and 3."""

    def make(device: torch.device) -> dict[str, Any]:
        rows, size = shape
        logits = (torch.randn(rows, max(size, stride), device=device) * spread).to(dtype)[:, :size]
        if broken:
            logits[0, size // 2], logits[1, size - 1], logits[2:4] = torch.nan, torch.inf, -torch.inf
        made: dict[str, Any] = dict.fromkeys(("temperature", "keys", "threshold", "flags"))
        made["logits"] = logits
        if random:
            # Every third row is greedy.
            made["temperature"] = torch.arange(rows, device=device).remainder(3).float() * 0.6
            seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), device=device)
            made["keys"] = torch.stack([seeds, torch.arange(rows, device=device) * 999], dim=1)
        if filtered:
            # Two rows of three keep half or so, every third only the first of its largest.
            cut, last = logits[:, size // 3].float().clone(), torch.full((rows,), size // 3, device=device)
            cut[1::3], last[1::3] = logits[1::3].float().amax(1), logits[1::3].float().argmax(1)
            made["threshold"] = cut, last.int()
        if flagged:
            made["flags"] = torch.arange(rows, dtype=torch.int32, device=device).remainder(4)
        return made

    return Case(name, make, Work(bytes=shape[0] * shape[1] * dtype.itemsize))


_BF16 = torch.bfloat16

SPECS = (
    KernelSpec(
        name="sampling_draw",
        summary="largest logit, or a draw by Gumbel noise from the request's own stream",
        launcher=_run,
        reference=_reference,
        tolerance="sampling_draw",
        cases=(
            _case("greedy", (4, 700), random=False),
            _case("greedy, ties of bfloat16", (4, 700), _BF16, random=False, spread=0.02),
            _case("greedy, all zero", (2, 300), random=False, spread=0.0),
            _case("draw", (6, 500)),
            _case("draw, float16, rows apart", (4, 333), torch.float16, stride=340),
            _case("draw, filtered", (6, 500), filtered=True),
            _case("draw, filtered ties", (6, 500), _BF16, filtered=True, spread=0.02),
            _case("broken", (6, 300), broken=True),
            _case("broken, flagged", (8, 300), broken=True, flagged=True, filtered=True),
            _case("greedy, broken, flagged", (8, 100), random=False, broken=True, flagged=True),
            _case("one token", (2, 1)),
            _case("no rows", (0, 40)),
        ),
        signatures=(
            _case("V 32000, greedy, bfloat16", (64, 32000), _BF16, random=False),
            _case("V 151936, greedy, float32, masks", (64, 151936), random=False, flagged=True),
            _case("V 128256, draw, bfloat16", (64, 128256), _BF16),
            _case("V 151936, draw, filtered, bfloat16", (64, 151936), _BF16, filtered=True),
            _case("V 262144, draw, filtered, masks, float32", (64, 262144), filtered=True, flagged=True),
        ),
        faults=(
            Fault("(ids <= last)", "(ids < last)"),
            Fault("* -LN_2)) * LN_2", "* -LN_2))"),
            Fault("(z >> 27)) * _MULTIPLIER2", "(z >> 28)) * _MULTIPLIER2"),
            Fault("tl.atomic_xchg(arrived_ptr + row, 0)", "pass"),
            Fault("x / temperature", "x"),
            Fault("tl.where(image > best,", "tl.where(image >= best,"),
        ),
    ),
)
