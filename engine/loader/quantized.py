"""The quantized modules of a model: found before loading, filled with what the checkpoint has of them."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from halimede.engine.layers.embedding import Embedding
from halimede.engine.layers.linear import Linear
from halimede.engine.loader.host_memory import WeightMemory
from halimede.engine.quant.canonical import CanonicalWeight, PlainWeight
from halimede.engine.quant.forms.base import Placement
from halimede.engine.quant.forms.make import make_form
from halimede.engine.quant.scheme import ModuleKind, QuantScheme, WeightFormat
from halimede.engine.quant.stored import StoredModule

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class PlainFormat:
    """A part that is not quantized, of a fused module that is."""

    required: Sequence[str] = ("weight",)
    optional: Sequence[str] = ()

    def check(self, stored: StoredModule) -> None:
        """See WeightFormat."""
        self._weight(stored)

    def convert(self, stored: StoredModule) -> PlainWeight:
        """See WeightFormat."""
        return PlainWeight(self._weight(stored))

    def _weight(self, stored: StoredModule) -> torch.Tensor:
        return stored.get("weight", [(stored.out_features, stored.in_features)], _FLOATS)


@dataclass(frozen=True, slots=True)
class Part:
    """One of the checkpoint's modules: the whole of one of the model's, or some rows of a fused one."""

    name: str
    rows: int
    columns: int
    format: WeightFormat

    def stored(
        self, names: Mapping[str, str], read: Callable[[str], torch.Tensor], where: Callable[[str], str]
    ) -> StoredModule:
        """Its tensors in a checkpoint; names, read and where are as in StoredModule."""
        return StoredModule(self.name, self.rows, self.columns, names, read, where)

    def tensor_names(self) -> Iterator[tuple[str, str, bool]]:
        """Suffix and name of each tensor, and whether it must be there."""
        for suffixes, needed in ((self.format.required, True), (self.format.optional, False)):
            for suffix in suffixes:
                yield suffix, f"{self.name}.{suffix}", needed


@dataclass(frozen=True, slots=True)
class QuantizedModule:
    """A module of the model whose weight is quantized, in part at least. path: its name."""

    path: str
    parts: tuple[Part, ...]


def find_quantized(model: nn.Module, scheme: QuantScheme | None) -> list[QuantizedModule]:
    """The modules that a scheme quantizes, in the model's order. Modules tied to others come once."""
    if scheme is None:
        return []
    packed: Mapping[str, Sequence[str]] = getattr(model, "packed_modules", {})
    found, seen = [], set()
    for path, module in model.named_modules():
        if not isinstance(module, Linear | Embedding) or id(module.weight) in seen:
            continue
        seen.add(id(module.weight))
        rows, columns = module.weight.shape
        owner, _, name = path.rpartition(".")
        names, sizes = [path], [rows]
        if name in packed:
            names = [".".join(filter(None, (owner, part))) for part in packed[name]]
            sizes = list(module.output_sizes)  # type: ignore[arg-type]  # nn.Module.__getattr__ says Tensor
        kind: ModuleKind = "Embedding" if isinstance(module, Embedding) else "Linear"
        formats = [scheme.format_of(part, kind) for part in names]
        if any(formats):
            found.append(
                QuantizedModule(
                    path,
                    tuple(
                        Part(part, size, columns, format or PlainFormat())
                        for part, size, format in zip(names, sizes, formats, strict=True)
                    ),
                )
            )
    return found


def replaced_weights(model: nn.Module, modules: Collection[QuantizedModule]) -> set[str]:
    """Names of the parameters that forms take the place of."""
    weights = {id(model.get_parameter(f"{module.path}.weight")) for module in modules}
    return {
        name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in weights
    }


def put_form(
    model: nn.Module,
    module: QuantizedModule,
    weights: Sequence[CanonicalWeight],
    to: Placement,
    memory: WeightMemory,
) -> None:
    """Lay the weights of a module's parts out, in memory of their own, for it and for what is tied to it."""
    form = make_form(weights, to)
    for part in form.modules():
        for name, tensor in part.named_buffers(recurse=False):
            own = memory.empty(tuple(tensor.shape), tensor.dtype)
            part.register_buffer(name, own.copy_(tensor), persistent=False)
    replaced = model.get_parameter(f"{module.path}.weight")
    for owner in list(model.modules()):
        if isinstance(owner, Linear | Embedding) and owner.weight is replaced:
            owner.take_form(form)
