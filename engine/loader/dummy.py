"""Random weights in the place of a checkpoint's: to try out or time a model without having it."""

from dataclasses import replace

import torch
from torch import nn

from halimede.engine.loader.host_memory import WeightMemory
from halimede.engine.loader.outlines import outlines
from halimede.engine.loader.quantized import (
    QuantizedModule,
    find_quantized,
    put_form,
    replaced_weights,
)
from halimede.engine.loader.weights import assign_parameters, out_of_memory, parameter_dtype
from halimede.engine.quant.canonical import (
    CanonicalWeight,
    Fp8Weight,
    GroupedWeight,
    Int8Weight,
    PlainWeight,
)
from halimede.engine.quant.forms.base import Placement
from halimede.engine.quant.online import Int4Online
from halimede.engine.quant.scheme import QuantScheme

_SEED = 0


def fill_with_random_weights(
    model: nn.Module,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: QuantScheme | None = None,
) -> None:
    """Replace every parameter of `model`, which is on the meta device; two runs on one device agree.

    quantization: which weights are quantized, and how. Random ones are of the same kind, with the same
    scales everywhere; where it is not known without the checkpoint, of one of those that there may be.

    Matrices are such that a product keeps the size of its input, so that logits are finite in every data
    type and tokens differ; norms are one, biases zero. Raises ModelLoadError when the memory is not there.
    """
    generator = torch.Generator(device).manual_seed(_SEED)
    modules = find_quantized(model, quantization)
    replaced = replaced_weights(model, modules)
    parameters = {name: each for name, each in model.named_parameters() if name not in replaced}
    filled: dict[str, torch.Tensor] = {}
    memory = WeightMemory(device)
    try:
        for name, parameter in parameters.items():
            own = parameter_dtype(model, name, dtype)
            tensor = memory.empty(tuple(parameter.shape), own)
            if tensor.dim() == 1:
                tensor.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                bound = (3 / tensor.shape[-1]) ** 0.5  # variance 1 / inputs
                tensor.uniform_(-bound, bound, generator=generator)
            filled[name] = tensor
        for module in modules:
            _put_random_form(model, module, Placement(device, dtype), memory, generator)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(parameters, dtype, device) from error
    assign_parameters(model, filled)


def _put_random_form(
    model: nn.Module,
    module: QuantizedModule,
    to: Placement,
    memory: WeightMemory,
    generator: torch.Generator,
) -> None:
    weights = []
    for part in module.parts:
        kinds = outlines(part.format, part.rows, part.columns, to.dtype)
        kinds = kinds or outlines(Int4Online(), part.rows, part.columns, to.dtype)
        weights.append(_random_weight(kinds[0], generator))
    put_form(model, module, weights, to, memory)


def _random_weight(outline: CanonicalWeight, generator: torch.Generator) -> CanonicalWeight:
    """A weight of the outline's kind, on the generator's device: its codes are random, within the bound.

    Nothing is rounded: of a model with 8 billion weights that takes a minute of a CPU.
    """
    device, bound = generator.device, (3 / outline.shape[1]) ** 0.5  # variance 1 / inputs
    if isinstance(outline, GroupedWeight):
        return _random_groups(outline, bound, generator)
    if isinstance(outline, Int8Weight):
        codes = torch.randint(-127, 128, outline.shape, dtype=torch.int8, device=device, generator=generator)
        scales = torch.full_like(outline.scales, bound / 127, device=device)
        return replace(outline, weight=codes, scales=scales, static_scale=_scale_for(outline, 127))
    assert isinstance(outline, Fp8Weight | PlainWeight), f"nothing random like a {type(outline).__name__}"
    if isinstance(outline, PlainWeight):
        plain = torch.empty_like(outline.weight, device=device)
        return PlainWeight(plain.uniform_(-bound, bound, generator=generator))
    wide = torch.empty(outline.shape, dtype=torch.bfloat16, device=device)
    codes = wide.uniform_(-448, 448, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.full_like(outline.scales, bound / 448, device=device)
    return replace(outline, weight=codes, scales=scales, static_scale=_scale_for(outline, 448))


def _scale_for(outline: Int8Weight | Fp8Weight, largest: float) -> torch.Tensor | None:
    """The scale of calibrated activations, where there is one: norms, which are one, give hardly more."""
    return None if outline.static_scale is None else torch.full_like(outline.static_scale, 4 / largest)


def _random_groups(outline: GroupedWeight, bound: float, generator: torch.Generator) -> GroupedWeight:
    device, last = generator.device, (1 << outline.bits) - 1
    zero, offsets, table = outline.zero, outline.offsets, outline.table
    # Codes lie around the middle, or else sums over many inputs drift: without the lowest it is whole.
    first = 1 if isinstance(zero, int) and offsets is None and table is None else 0
    codes = torch.randint(
        first, last + 1, outline.shape, dtype=torch.uint8, device=device, generator=generator
    )
    step = 2 * bound / ((last - first + 1) ** 2 - 1) ** 0.5
    if isinstance(zero, torch.Tensor):  # the middle lies between two of them
        middle = 1 << outline.bits - 1
        zero = torch.randint(middle - 1, middle + 1, zero.shape, device=device, generator=generator)
        zero = zero.to(torch.uint8)
    elif offsets is not None:
        offsets = torch.full_like(offsets, (zero - last / 2) * step, device=device)
    if table is not None:
        step = bound / 3**0.5 / float(table.square().mean().sqrt())
    scales = torch.full_like(outline.scales, step, device=device)
    return replace(outline, codes=codes, scales=scales, zero=zero, offsets=offsets)
