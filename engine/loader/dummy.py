"""Random weights in the place of a checkpoint's: to try out or time a model without having it."""

import torch
from torch import nn

from halimede.engine.loader.host_memory import WeightMemory
from halimede.engine.loader.weights import assign_parameters, out_of_memory, parameter_dtype

_SEED = 0


def fill_with_random_weights(model: nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
    """Replace every parameter of `model`, which is on the meta device; two runs on one device agree.

    Matrices are such that a product keeps the size of its input, so that logits are finite in every data
    type and tokens differ; norms are one, biases zero. Raises ModelLoadError when the memory is not there.
    """
    generator = torch.Generator(device).manual_seed(_SEED)
    parameters = dict(model.named_parameters())
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
    except torch.OutOfMemoryError as error:
        raise out_of_memory(parameters, dtype, device) from error
    assign_parameters(model, filled)
