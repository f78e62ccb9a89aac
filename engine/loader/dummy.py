"""Random weights in the place of a checkpoint's: to try out or time a model without having it."""

import torch
from torch import nn

from halimede.engine.loader.host_memory import WeightMemory
from halimede.engine.loader.quantized import (
    PlainFormat,
    QuantizedModule,
    find_quantized,
    put_form,
    replaced_weights,
)
from halimede.engine.loader.weights import assign_parameters, out_of_memory, parameter_dtype
from halimede.engine.quant.forms.base import Placement
from halimede.engine.quant.online import OnlineScheme, online_scheme
from halimede.engine.quant.scheme import QuantScheme, WeightFormat

_SEED = 0
_EIGHT_BITS = ("fp8", "modelopt")  # methods whose weights are FP8; those of others are taken for 4 bits


def fill_with_random_weights(
    model: nn.Module,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: QuantScheme | None = None,
) -> None:
    """Replace every parameter of `model`, which is on the meta device; two runs on one device agree.

    quantization: which weights are quantized. Random ones are as if that were done while loading: in FP8 for
    a checkpoint of FP8, else in 4 bits, whatever the checkpoint's own codes are like.

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
            _put_random_form(model, module, quantization, Placement(device, dtype), memory)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(parameters, dtype, device) from error
    assign_parameters(model, filled)


def _put_random_form(
    model: nn.Module,
    module: QuantizedModule,
    scheme: QuantScheme | None,
    to: Placement,
    memory: WeightMemory,
) -> None:
    generator = torch.Generator().manual_seed(_SEED + len(module.path))
    weights = []
    for part in module.parts:
        format_ = PlainFormat() if isinstance(part.format, PlainFormat) else _stand_in(scheme)
        bound = (3 / part.columns) ** 0.5
        weight = torch.empty(part.rows, part.columns).uniform_(-bound, bound, generator=generator)
        read = {"weight": weight}.__getitem__
        weights.append(format_.convert(part.stored({"weight": "weight"}, read, str)))
    put_form(model, module, weights, to, memory)


def _stand_in(scheme: QuantScheme | None) -> WeightFormat:
    if not isinstance(scheme, OnlineScheme):
        scheme = online_scheme("fp8" if scheme is not None and scheme.method in _EIGHT_BITS else "int4")
    return scheme.format
