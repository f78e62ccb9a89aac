"""Random quantized weights, made as while loading, and torch's own products with them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from ceilings import float8_type

from halimede.engine.quant.canonical import CanonicalWeight, Fp8Weight
from halimede.engine.quant.forms.base import Placement, QuantizedActivations, WeightForm
from halimede.engine.quant.forms.make import make_form
from halimede.engine.quant.online import OnlineMethod, online_scheme
from halimede.engine.quant.stored import StoredModule
from halimede.kernels.gpu.quantize import per_token_quant

KINDS = ("int4", "fp8", "fp8 block", "int8")
"""int4 in groups of 128 with zero points; fp8 and int8 with scales of rows; fp8 with those of 128 x 128."""

DTYPE = torch.bfloat16
Call = Callable[[], Any]
_BLOCK = 128
_E4M3_MAX = 448.0
_INT_MM_ROWS = 17  # torch._int_mm takes no fewer on a GPU
_SCALED_MM_ROWS = 16


def random_weight(kind: str, rows: int, columns: int, device: torch.device) -> CanonicalWeight:
    """A weight [N, K] of variance 1 / K, so that a product is as large as its input, of one of KINDS."""
    weight = (torch.randn(rows, columns, device=device) * columns**-0.5).to(DTYPE)
    if kind == "fp8 block":
        return block_weight(weight)
    method: OnlineMethod = "int4" if kind == "int4" else "fp8" if kind == "fp8" else "int8"
    stored = StoredModule("random", rows, columns, {"weight": "weight"}, {"weight": weight}.__getitem__, str)
    with device:  # what it makes is there too
        return online_scheme(method).format.convert(stored)


def block_weight(weight: torch.Tensor) -> Fp8Weight:
    """weight [N, K], multiples of 128, with a scale for each block: its largest magnitude / 448."""
    rows, columns = weight.shape
    blocks = weight.float().view(rows // _BLOCK, _BLOCK, columns // _BLOCK, _BLOCK)
    scales = blocks.abs().amax((1, 3)) / _E4M3_MAX
    codes = (blocks / scales[:, None, :, None]).clamp_(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return Fp8Weight(codes.view(rows, columns), scales, (_BLOCK, _BLOCK))


def with_tensors(weight: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The weight with another tensor for each of its own."""
    values = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return replace(weight, **{n: change(v) for n, v in values.items() if isinstance(v, torch.Tensor)})


def form_of(weight: CanonicalWeight, device: torch.device) -> WeightForm:
    """What the engine multiplies with, in memory of its own."""
    return make_form([with_tensors(weight, torch.clone)], Placement(device, DTYPE))


def form_on_meta(weight: CanonicalWeight) -> WeightForm:
    """Its shapes alone: what it launches can be found out."""
    meta = torch.device("meta")
    return make_form([with_tensors(weight, lambda tensor: tensor.to(meta))], Placement(meta, DTYPE))


def bytes_of(form: WeightForm) -> int:
    """Of all that it holds."""
    return sum(buffer.nbytes for buffer in form.buffers())


def values_of(x: QuantizedActivations) -> torch.Tensor:
    """What rounded activations stand for, (M, K) float64."""
    scales = x.scales.double()
    if scales.dim() == 2:
        scales = scales.repeat_interleave(x.codes.shape[1] // scales.shape[1], 1)
    else:
        scales = scales[:, None]
    return x.codes.float().double() * scales


def codes_for(form: WeightForm, x: torch.Tensor) -> QuantizedActivations | None:
    """x as the layer before the form would give it; None where the form does not take it rounded."""
    wanted = form.quantizes
    if wanted is None:
        return None
    codes, scales = per_token_quant(x, wanted.dtype, wanted.group_size, wanted.scale)
    return QuantizedActivations(codes, scales, x.dtype)


def torch_calls(kind: str, weights: Sequence[Any], x: torch.Tensor) -> list[Call]:
    """torch's own product of 8-bit codes with each of the weights, called in the first way that works.

    Of fp8 with scales, of int8 without. Empty where torch has none; what the last way raises otherwise.
    """
    if kind == "int8":
        rows = max(x.shape[0], _INT_MM_ROWS)
        codes = torch.randint(-127, 128, (-(-rows // 8) * 8, x.shape[1]), dtype=torch.int8, device=x.device)
        return [partial(torch._int_mm, codes, weight.weight.t()) for weight in weights]
    if kind != "fp8":
        return []
    ways = list(_scaled_mm_ways(x))
    for number, way in enumerate(ways):
        calls: list[Call] = [partial(way, *_scaled_mm_weight(weight)) for weight in weights]
        try:
            calls[0]()
        except (RuntimeError, ValueError, NotImplementedError):
            if number == len(ways) - 1:
                raise
            continue
        return calls
    return []


def _scaled_mm_ways(x: torch.Tensor) -> Iterator[Callable[..., Any]]:
    """With as many rows as x has, then with 16 at least; accumulating fast, then as it does by default."""
    for rows in dict.fromkeys((x.shape[0], -(-x.shape[0] // _SCALED_MM_ROWS) * _SCALED_MM_ROWS)):
        codes = torch.randn(rows, x.shape[1], device=x.device).to(float8_type(x.device))
        scales = torch.ones(rows, 1, device=x.device)
        for fast in (True, False):
            yield partial(_scaled_mm, codes, scales, fast)


def _scaled_mm(
    codes: torch.Tensor, scales: torch.Tensor, fast: bool, weight: torch.Tensor, weight_scales: torch.Tensor
) -> torch.Tensor:
    return torch._scaled_mm(
        codes, weight, scale_a=scales, scale_b=weight_scales, out_dtype=DTYPE, use_fast_accum=fast
    )


def _scaled_mm_weight(weight: Fp8Weight) -> tuple[torch.Tensor, torch.Tensor]:
    """[K, N] with unit stride in K, and (1, N)."""
    codes, dtype = weight.weight, float8_type(weight.weight.device)
    if codes.dtype != dtype:
        codes = codes.float().clamp_(-240, 240).to(dtype)
    return codes.t(), weight.scales.float().view(1, -1)
