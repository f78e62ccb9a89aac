"""A model on the meta device that launches all that the whole one does: a layer of each kind, no numbers."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from halimede.engine.layers.embedding import Embedding
from halimede.engine.layers.linear import Linear
from halimede.engine.loader.host_memory import WeightMemory
from halimede.engine.loader.outlines import outlines
from halimede.engine.loader.quantized import QuantizedModule, find_quantized, put_form
from halimede.engine.loader.weights import assign_parameters, parameter_dtype
from halimede.engine.models.base import CausalLM
from halimede.engine.models.config import ModelConfig
from halimede.engine.models.registry import build_model
from halimede.engine.quant.canonical import CanonicalWeight
from halimede.engine.quant.forms.base import Placement, UnloadedForm

_META = torch.device("meta")
_LAYER = re.compile(r"(?P<before>.*\blayers\.)(?P<number>\d+)(?P<after>\..*)")


@dataclass(frozen=True, slots=True)
class _Module:
    """A quantized module and, for each of its parts, what it may be."""

    module: QuantizedModule
    kinds: tuple[tuple[CanonicalWeight, ...], ...]

    @property
    def count(self) -> int:
        """How many kinds there are of the parts, taken together."""
        return max(map(len, self.kinds)) if all(self.kinds) else 1


def meta_models(config: ModelConfig, dtype: torch.dtype) -> Iterator[CausalLM]:
    """The model with a layer of each kind and the last one, which is run for the outputs alone; once for each
    kind that its quantized weights may turn out to be of. dtype: of the weights.

    Layers differ by their window and by how they are quantized. Called where launches are intercepted, by
    whose target forms are laid out.
    """
    whole = find_quantized(build_model(config), config.quantization)
    few, numbers = _few_layers(config, whole)
    modules = [_with_kinds(module, dtype) for module in _renumbered(whole, numbers)]
    for kind in range(max((module.count for module in modules), default=1)):
        model = build_model(few)
        for module in modules:
            _put_kind(model, module, kind, dtype)
        _fill(model, dtype)
        yield model


def _few_layers(config: ModelConfig, modules: list[QuantizedModule]) -> tuple[ModelConfig, list[int]]:
    """The config of a model with the layers that it takes, and their numbers in the whole one."""
    formats: list[list[object]] = [[] for _ in range(config.num_hidden_layers)]
    for module in modules:
        place = _LAYER.fullmatch(module.path)
        if place is not None:
            parts = tuple(part.format for part in module.parts)
            formats[int(place["number"])].append((place["after"], parts))
    kinds: list[object] = []
    numbers = []
    for number, kind in enumerate(zip(config.sliding_windows, formats, strict=True)):
        if kind not in kinds:
            kinds.append(kind)
            numbers.append(number)
    numbers.append(config.num_hidden_layers - 1)
    if len(numbers) >= config.num_hidden_layers:
        return config, list(range(config.num_hidden_layers))
    windows = tuple(config.sliding_windows[number] for number in numbers)
    return replace(config, num_hidden_layers=len(numbers), sliding_windows=windows), numbers


def _renumbered(modules: list[QuantizedModule], numbers: list[int]) -> Iterator[QuantizedModule]:
    """The modules of the layers of these numbers, which are 0, 1, ... now, and those of no layer."""
    for module in modules:
        place = _LAYER.fullmatch(module.path)
        if place is None:
            yield module
            continue
        for new, old in enumerate(numbers):
            if old == int(place["number"]):
                yield replace(module, path=f"{place['before']}{new}{place['after']}")


def _with_kinds(module: QuantizedModule, dtype: torch.dtype) -> _Module:
    parts = module.parts
    return _Module(
        module, tuple(tuple(outlines(part.format, part.rows, part.columns, dtype)) for part in parts)
    )


def _put_kind(model: CausalLM, module: _Module, kind: int, dtype: torch.dtype) -> None:
    """Put the form of a module into the model; one that launches nothing where no kind is known."""
    place = Placement(_META, dtype)
    if all(module.kinds):
        weights = [kinds[min(kind, len(kinds) - 1)] for kinds in module.kinds]
        put_form(model, module.module, weights, place, WeightMemory(_META))
        return
    replaced = model.get_parameter(f"{module.module.path}.weight")
    form = UnloadedForm((replaced.shape[0], replaced.shape[1]), place)
    for owner in list(model.modules()):
        if isinstance(owner, Linear | Embedding) and owner.weight is replaced:
            owner.take_form(form)


def _fill(model: CausalLM, dtype: torch.dtype) -> None:
    """Give the other parameters the types that loading gives them."""
    assign_parameters(
        model,
        {
            name: torch.empty(parameter.shape, dtype=parameter_dtype(model, name, dtype), device=_META)
            for name, parameter in model.named_parameters()
        },
    )
