"""Where min_p, top_k and top_p cut each row's logits, without sorting.

In: logits (S, V), temperature, min_p, top_p (S) float32, top_k (S) int32. min_p keeps what has at least min_p
times the largest probability, top_k of those the k largest and all that equal the last of them, top_p of
those the fewest whose probabilities sum to p; equal ones go by token id.
Out: cut (S) float32 and last (S) int32: a token stays if its logit is above cut, or equal to it with an id
up to last. One program per row; a row without a filter ends at once, any other reads its logits about four
times, most of them from the L2 cache.
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
    load_logits,
    nth_equal,
    row_config,
    search,
)
from halimede.kernels.launch import launch, target_of
from halimede.kernels.spec import Case, Fault, KernelSpec, Tensors, Work
from halimede.kernels.tuning import pick_config


@triton.jit
def _threshold_kernel(
    logits_ptr,
    temperature_ptr,
    min_p_ptr,
    top_k_ptr,
    top_p_ptr,
    cut_ptr,
    last_ptr,
    kept_ptr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    min_p, top_p = tl.load(min_p_ptr + row), tl.load(top_p_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    cut, last = float("-inf"), SIZE
    if (min_p > 0.0) | (top_k < SIZE) | (top_p < 1.0):
        temperature = tl.load(temperature_ptr + row)
        row_ptr, kept_ptr = logits_ptr + row * STRIDE, kept_ptr + row * (2 * BLOCK)
        largest = tl.full([BLOCK], float("-inf"), tl.float32)
        smallest = tl.full([BLOCK], float("inf"), tl.float32)
        num_kept = -1
        for start in tl.range(0, SIZE, BLOCK, num_stages=STAGES):
            x, _ = load_logits(row_ptr, start, SIZE, BLOCK)
            largest = tl.maximum(largest, x)
            smallest = tl.minimum(smallest, tl.where(x > float("-inf"), x, float("inf")))
        peak = tl.max(largest)
        cut = tl.minimum(tl.min(smallest), peak)
        if min_p > 0.0:
            cut = tl.maximum(cut, peak + temperature * (tl.log2(min_p) * LN_2))
        # First top_k by counts, then top_p by weights: one body, so that it is compiled once.
        for stage in range(2):
            if tl.where(stage == 0, top_k < SIZE, top_p < 1.0):
                share = tl.where(stage == 0, 0.0, top_p)
                scale = tl.where(stage == 0, 0.0, LOG2_E / temperature)
                # All tokens below this together weigh less than 1 - p of the largest one.
                spread = tl.log2(SIZE / tl.maximum(1.0 - top_p, 1e-10)) * LN_2 + 1.0
                tail = peak - temperature * spread
                bottom = tl.where(stage == 0, cut, tl.maximum(cut, tail))
                cut, target, above, count, count_above, num_kept = search(
                    row_ptr,
                    kept_ptr,
                    num_kept,
                    cut,
                    bottom,
                    peak,
                    scale,
                    share,
                    top_k.to(tl.float32),
                    0,
                    SIZE,
                    BLOCK,
                )
                weight = tl.exp2((cut - peak) * scale)
                needed = tl.where(weight > 0.0, (target - above) / weight, SIZE)
                nth = tl.maximum(tl.ceil(tl.minimum(needed, SIZE)).to(tl.int32), 1)
                if (stage == 1) & (nth < count - count_above):
                    last = nth_equal(row_ptr, kept_ptr, num_kept, cut, nth, SIZE, BLOCK)
    tl.store(cut_ptr + row, cut)
    tl.store(last_ptr + row, last)


def sampling_threshold(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut (S) float32 and last token id (S) int32 of logits (S, V) in any float dtype, unit stride in V.

    temperature (S) float32, above 0 where a filter is used. min_p (S) float32, 0 for none; top_k (S) int32, V
    or more for none; top_p (S) float32, 1 or more for none. Without any: -inf and V.
    """
    rows, size = logits.shape
    given = (temperature, min_p, top_k, top_p)
    if logits.stride(1) != 1 or any(len(p) != rows or not p.is_contiguous() for p in given):
        raise KernelError(
            f"sampling_threshold takes logits (S, V) with unit stride and contiguous parameters (S); got "
            f"{tuple(logits.shape)} with strides {logits.stride()} and {[tuple(p.shape) for p in given]}"
        )
    target = target_of(logits)
    config = pick_config(
        "sampling_threshold", target, f"{logits.dtype}", size, lambda: row_config(size, target)
    )
    assert size < 1024 * config.blocks["BLOCK"], "more blocks than counts have room for"
    cut = torch.empty(rows, dtype=torch.float32, device=logits.device)
    last = torch.empty(rows, dtype=torch.int32, device=logits.device)
    kept = torch.empty(rows, 2 * config.blocks["BLOCK"], dtype=torch.int32, device=logits.device)
    launch(
        _threshold_kernel,
        (rows,),
        logits,
        temperature,
        min_p,
        top_k,
        top_p,
        cut,
        last,
        kept,
        config=config,
        SIZE=size,
        STRIDE=logits.stride(0),
    )
    return cut, last


def sampling_threshold_reference(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by sorting each row, in float64."""
    cuts, lasts = [], []
    settings = zip(temperature.tolist(), min_p.tolist(), top_k.tolist(), top_p.tolist(), strict=True)
    for row, (t, m, k, p) in zip(logits.double(), settings, strict=True):
        cut, last = _reference_row(row, t, m, k, p)
        cuts.append(cut)
        lasts.append(last)
    return torch.tensor(cuts, dtype=torch.float32), torch.tensor(lasts, dtype=torch.int32)


def _reference_row(
    row: torch.Tensor, temperature: float, min_p: float, k: int, p: float
) -> tuple[float, int]:
    size = len(row)
    if min_p <= 0 and k >= size and p >= 1:
        return -torch.inf, size
    values, ids = row.sort(descending=True, stable=True)
    values = values[values > -torch.inf]
    cut = float(values[-1])
    if min_p > 0:
        cut = max(cut, float(values[0] + temperature * torch.tensor(min_p, dtype=torch.float64).log()))
        values = values[values >= cut]
    if k < size:
        values = values[values >= values[min(k, len(values)) - 1]]
        cut = float(values[-1])
    if p >= 1:
        return cut, size
    mass = (values / temperature).softmax(0)
    kept = int((mass.cumsum(0) - mass < p - 1e-9).sum())
    cut = float(values[kept - 1])
    return cut, size if kept == int((values >= cut).sum()) else int(ids[kept - 1])


def _run(**arguments: torch.Tensor) -> Tensors:
    return sampling_threshold(**arguments)


def _reference(**arguments: torch.Tensor) -> Tensors:
    return sampling_threshold_reference(**arguments)


def _case(
    name: str,
    rows: Sequence[tuple[float, float, int, float]],
    size: int,
    dtype: torch.dtype = torch.float32,
    *,
    spread: float = 3.0,
    stride: int = 0,
    forbidden: bool = False,
) -> Case:
    """rows: temperature, min_p, top_k, top_p of each. forbidden: half of the logits are -inf."""

    def make(device: torch.device) -> dict[str, Any]:
        logits = (torch.randn(len(rows), max(size, stride), device=device) * spread).to(dtype)[:, :size]
        if forbidden and device.type != "meta":
            logits[:, ::2] = -torch.inf
        columns = list(zip(*rows, strict=True)) or [()] * 4
        kinds = (torch.float32, torch.float32, torch.int32, torch.float32)
        made = [torch.tensor(c, dtype=d, device=device) for c, d in zip(columns, kinds, strict=True)]
        names = ("temperature", "min_p", "top_k", "top_p")
        return {"logits": logits, **dict(zip(names, made, strict=True))}

    return Case(name, make, Work(bytes=len(rows) * size * dtype.itemsize))


_OFF = 1 << 20
_TOP_K = ((1.0, 0.0, 1, 1.0), (0.3, 0.0, 20, 1.0), (1.0, 0.0, 250, 1.0))
_TOP_P = ((1.0, 0.0, _OFF, 0.9), (0.5, 0.0, _OFF, 1e-6), (2.0, 0.0, _OFF, 0.999))
_MIXED = (
    (1.0, 0.1, _OFF, 1.0),
    (1.5, 0.05, 30, 0.9),
    (1.0, 0.0, _OFF, 1.0),
    (0.7, 1.0, 5, 0.5),
    (1.0, 0.0, 50, 0.8),
)
_SERVING = ((1.0, 0.0, 50, 0.9),) * 64

SPECS = (
    KernelSpec(
        name="sampling_threshold",
        summary="where min_p, top_k and top_p cut a row, by counting and weighing above pivots",
        launcher=_run,
        reference=_reference,
        tolerance="sampling_threshold",
        cases=(
            _case("top_k", _TOP_K, 300),
            _case("top_p", _TOP_P, 300),
            _case("mixed", _MIXED, 300),
            _case("mixed, half forbidden", _MIXED, 200, forbidden=True),
            _case("ties of bfloat16", _TOP_P, 400, torch.bfloat16, spread=0.02),
            _case("all equal", _TOP_K + _TOP_P, 130, spread=0.0),
            _case("float16, rows apart", _MIXED[:2], 333, torch.float16, stride=340),
            _case("one token", _MIXED[:2], 1),
            _case("no rows", (), 40),
        ),
        signatures=(
            _case("V 32000, float32", _SERVING, 32000),
            _case("V 151936, bfloat16", _SERVING, 151936, torch.bfloat16),
            _case("V 262144, float32", _SERVING, 262144),
        ),
        faults=(
            Fault("tl.ceil(tl.minimum(needed, SIZE))", "tl.floor(tl.minimum(needed, SIZE))"),
            Fault("tl.log2(min_p) * LN_2", "tl.log2(min_p)"),
            Fault("LOG2_E / temperature", "LOG2_E"),
            Fault("tl.where(stage == 0, 0.0, top_p)", "tl.where(stage == 0, 0.0, top_p * 0.9)"),
            Fault("top_k.to(tl.float32),", "top_k.to(tl.float32) + 1,"),
        ),
    ),
)
