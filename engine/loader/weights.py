"""Fills a model with the tensors of a checkpoint, one tensor at a time.

Tensors are always copied into memory of their own, on the CPU too. A view into the mapped file would be free,
but safetensors files align tensors to 8 bytes only, so whether it can be used would hang on the length of the
header, and a file overwritten in place would change the weights of a running engine.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import nn
from tqdm import tqdm

from halimede.engine.loader.host_memory import WeightMemory, return_free_memory
from halimede.engine.loader.kv_scales import take_kv_scales
from halimede.engine.loader.mapping import Plan, Slice, plan_loading
from halimede.engine.loader.model_files import ModelFiles
from halimede.engine.loader.quantized import QuantizedModule, find_quantized, put_form
from halimede.engine.loader.safetensors import SafetensorsWeights
from halimede.engine.loader.torch_bin import TorchBinWeights
from halimede.engine.quant.forms.base import Placement
from halimede.engine.quant.gguf import GgufScheme
from halimede.engine.quant.scheme import QuantScheme, WeightFormat
from halimede.engine.quant.stored import StoredModule
from halimede.errors import ModelLoadError, UnsupportedQuantizationError

_SHOWN = 5  # names listed in an error message
_GIB = 1 << 30


class WeightSource(Protocol):
    """Reads the tensors of a checkpoint one at a time; a context manager."""

    def names(self) -> Collection[str]:
        """Hugging Face names of all tensors, in the order in which they are best read."""
        ...

    def get(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, possibly a view into a mapped file. ModelLoadError when it is unreadable."""
        ...

    def where(self, name: str) -> str:
        """Name of the file that holds the tensor, for messages."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_weights(files: ModelFiles, quantization: QuantScheme | None = None) -> WeightSource:
    """Open the weight files of a checkpoint; ModelLoadError when one of them is damaged.

    quantization: as load_weights will be given it.
    """
    if files.format == "gguf":
        from halimede.engine.loader.gguf import GgufWeights

        types = quantization.types if isinstance(quantization, GgufScheme) else ()
        return GgufWeights(files.weights, {f"{module}.weight" for module in types})
    if files.format == "torch_bin":
        return TorchBinWeights(files.weights)
    return SafetensorsWeights(files.weights)


def load_weights(
    model: nn.Module,
    source: WeightSource,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: bool,
    quantization: QuantScheme | None = None,
) -> None:
    """Replace every parameter of `model` by the checkpoint's, on `device` and in `dtype`; weights that are
    quantized become forms.

    The model is built on the meta device. Optional attributes of it are read: `packed_modules` names the
    modules that one fused module is made of (the fused module's `output_sizes` has the rows of each),
    `ignored_weights` holds regular expressions of tensors to leave out, `float32_weights` of parameters that
    stay in float32, and `convert_weight` makes of a tensor what its parameter holds. Memory: the parameters
    and one tensor, or what one quantized module is made of.

    Raises ModelLoadError, before anything is read, when a tensor is missing or nothing takes it; before
    memory is taken, when a tensor of a quantized weight has the wrong shape or scales that are not finite;
    and while reading, when another has the wrong shape. UnsupportedQuantizationError when one is not of a
    floating type.
    """
    modules = find_quantized(model, quantization)
    plan = plan_loading(model, source.names(), modules)
    check_complete(model, plan, source)
    stored = [(module, _checked(module, plan, source)) for module in modules]
    _check_zero(plan.zero_biases, source)
    take_kv_scales(model, plan.kv_scales, source.get, source.where)
    parameters = dict(model.named_parameters())
    bar = tqdm(
        total=len(plan.slices) + sum(map(len, plan.parts.values())),
        desc="Loading weights",
        unit="tensor",
        disable=not progress,
    )
    try:
        with bar:
            memory = WeightMemory(device)
            filled = _fill(model, parameters, plan, source, dtype, memory, bar)
            for module, parts in stored:
                weights = [format_.convert(tensors) for format_, tensors in parts]
                put_form(model, module, weights, Placement(device, dtype), memory)
                bar.update(sum(len(tensors.names) for _, tensors in parts))
    except torch.OutOfMemoryError as error:
        raise out_of_memory(parameters, dtype, device) from error
    assign_parameters(model, filled)
    return_free_memory()


def _checked(
    module: QuantizedModule, plan: Plan, source: WeightSource
) -> list[tuple[WeightFormat, StoredModule]]:
    """Of each part of a module its format and its tensors; see WeightFormat.check."""
    parts = [
        (part.format, part.stored(plan.parts[part.name], source.get, source.where)) for part in module.parts
    ]
    for format_, tensors in parts:
        format_.check(tensors)
    return parts


def _fill(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    plan: Plan,
    source: WeightSource,
    dtype: torch.dtype,
    memory: WeightMemory,
    bar: "tqdm[Any]",
) -> dict[str, torch.Tensor]:
    """The parameters that are not quantized, by name."""
    convert: Callable[[str, torch.Tensor], torch.Tensor] = getattr(model, "convert_weight", _as_it_is)
    filled: dict[str, torch.Tensor] = {}
    for name, part in plan.slices.items():
        tensor = source.get(name)
        _check_tensor(tensor, name, part, source)
        shape = parameters[part.parameter].shape
        if part.parameter not in filled:
            own = parameter_dtype(model, part.parameter, dtype)
            filled[part.parameter] = memory.empty(tuple(shape), own)
        target = filled[part.parameter]
        if part.shape != tuple(shape):
            target = target.narrow(0, part.start, part.shape[0])
        target.copy_(convert(part.parameter, tensor))
        bar.update()
    return filled


def _as_it_is(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def parameter_dtype(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """The type that parameter `name` has in a model of `dtype`: float32 where the model says so."""
    patterns: Sequence[str] = getattr(model, "float32_weights", ())
    return torch.float32 if any(re.search(pattern, name) for pattern in patterns) else dtype


def out_of_memory(
    parameters: Mapping[str, nn.Parameter], dtype: torch.dtype, device: torch.device
) -> ModelLoadError:
    """The error for parameters that do not fit."""
    needed = sum(math.prod(parameter.shape) for parameter in parameters.values()) * dtype.itemsize
    return ModelLoadError(
        f"the weights need {needed / _GIB:.2f} GiB in {dtype}, more than {device} has free; free its "
        "memory, or take a smaller model or a device with more memory"
    )


def assign_parameters(model: nn.Module, filled: Mapping[str, torch.Tensor]) -> None:
    """Put the tensors in the place of the model's parameters; tied ones stay tied."""
    made = {
        id(parameter): nn.Parameter(filled[name], requires_grad=False)
        for name, parameter in model.named_parameters()
        if name in filled
    }
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        path, _, leaf = name.rpartition(".")
        if id(parameter) in made:
            setattr(model.get_submodule(path), leaf, made[id(parameter)])


def check_complete(model: nn.Module, plan: Plan, source: WeightSource) -> None:
    """ModelLoadError where the plan for a model lacks tensors of the checkpoint, or has no place for some."""
    kind = type(model).__name__
    if plan.missing:
        hint = "the checkpoint is incomplete or its config.json describes another model: download it again"
        if plan.missing == ("lm_head.weight",):
            hint = (
                'if the model shares it with the embedding, set "tie_word_embeddings": true in its '
                "config.json; "
                "else download the checkpoint again"
            )
        searched = _some({source.where(name) for name in source.names()})
        raise ModelLoadError(
            f"{kind} needs {len(plan.missing)} tensors that the checkpoint lacks: {_some(plan.missing)}; "
            f"searched: {searched}; {hint}"
        )
    if plan.unexpected:
        listed = _some(f"{name} ({source.where(name)})" for name in plan.unexpected)
        raise ModelLoadError(
            f"the checkpoint has {len(plan.unexpected)} tensors that {kind} has no place for: {listed}; "
            "without them the results would be wrong: check that config.json belongs to these weights "
            "(biases, number of layers), or that this variant of the architecture is supported"
        )


def _check_zero(biases: Sequence[str], source: WeightSource) -> None:
    """AutoGPTQ wrote zeros as biases of modules that have none; ModelLoadError for others."""
    for name in biases:
        if bool(source.get(name).any()):
            raise ModelLoadError(
                f"{source.where(name)}: the tensor {name} is a bias that is not zero, of a module that has "
                "none by the config.json; check that config.json belongs to these weights"
            )


def _check_tensor(tensor: torch.Tensor, name: str, part: Slice, source: WeightSource) -> None:
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise UnsupportedQuantizationError(
            f"{source.where(name)}: the tensor {name} is of type {tensor.dtype}, a quantized weight whose "
            "scheme the config.json does not tell or that is not supported; use a checkpoint in float32, "
            "bfloat16 or float16"
        )
    if tuple(tensor.shape) != part.shape:
        raise ModelLoadError(
            f"{source.where(name)}: the tensor {name} has the shape {tuple(tensor.shape)}, expected "
            f"{part.shape} from the config.json; the two are not of the same model, or one of them is "
            "damaged: download both again"
        )


def _some(names: Iterable[str]) -> str:
    """The first few of the names, sorted, and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - _SHOWN
    return ", ".join(ordered[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
