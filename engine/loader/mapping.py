"""Which tensor of a checkpoint goes where in a model."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from halimede.engine.loader.kv_scales import is_kv_scale
from halimede.engine.loader.quantized import QuantizedModule, replaced_weights


@dataclass(frozen=True, slots=True)
class Slice:
    """The rows of a parameter that one tensor of the checkpoint fills, from `start` on."""

    parameter: str
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to load: `slices` by checkpoint name in the checkpoint's order, and what does not fit.

    `parts` has, for the name of each part of the quantized modules, the checkpoint's name of each suffix that
    is there; `kv_scales` the checkpoint's name of each scale of the KV cache by the model's; `zero_biases`
    the checkpoint's names of biases of quantized modules that the model does not have: they must be zero.
    `missing` has the names that the model needs and the checkpoint lacks, `unexpected` the checkpoint's names
    that nothing in the model takes.
    """

    slices: Mapping[str, Slice]
    parts: Mapping[str, Mapping[str, str]]
    kv_scales: Mapping[str, str]
    zero_biases: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def plan_loading(model: nn.Module, names: Collection[str], quantized: Sequence[QuantizedModule] = ()) -> Plan:
    """Match the checkpoint's `names` with the parameters of `model` and the tensors of its quantized modules.

    Parameters that are tied (one object under several names) are filled once, by the first of their names
    that the checkpoint has; the others may be there and are not read.
    """
    replaced = replaced_weights(model, quantized)
    expected = _expected(model, replaced)
    needed = {
        name: is_needed
        for module in quantized
        for part in module.parts
        for _, name, is_needed in part.tensor_names()
    }
    known = expected.keys() | needed.keys()
    renamed = _renamed(names, known)
    checkpoint_names = {model_name: name for name, model_name in renamed.items()}
    chosen, missing = _choose_sources(expected, checkpoint_names)
    missing += [name for name, is_needed in needed.items() if is_needed and name not in checkpoint_names]
    biases = {f"{part.name}.bias" for module in quantized for part in module.parts}
    left = {model_name: name for name, model_name in renamed.items() if model_name not in known}
    kv_scales = {
        model_name: name for model_name, name in left.items() if quantized and is_kv_scale(model_name)
    }
    taken = replaced | biases | kv_scales.keys()
    ignored: Sequence[str] = getattr(model, "ignored_weights", ())
    return Plan(
        slices={name: chosen[name] for name in names if name in chosen},
        parts=_locate_parts(quantized, checkpoint_names),
        kv_scales=kv_scales,
        zero_biases=tuple(name for model_name, name in left.items() if model_name in biases),
        missing=tuple(missing),
        unexpected=tuple(
            name
            for model_name, name in left.items()
            if model_name not in taken and not any(re.search(pattern, model_name) for pattern in ignored)
        ),
    )


def _choose_sources(
    expected: Mapping[str, Slice], checkpoint_names: Mapping[str, str]
) -> tuple[dict[str, Slice], list[str]]:
    """What fills each slice, by the checkpoint's name, and the model's names of those that nothing fills."""
    sources: dict[Slice, str | None] = {}
    first_names: dict[Slice, str] = {}
    for model_name, part in expected.items():
        first_names.setdefault(part, model_name)
        if sources.get(part) is None:
            sources[part] = checkpoint_names.get(model_name)
    chosen = {name: part for part, name in sources.items() if name is not None}
    return chosen, [first_names[part] for part, name in sources.items() if name is None]


def _locate_parts(
    quantized: Sequence[QuantizedModule], checkpoint_names: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """Of each part the checkpoint's names of the tensors that are there, by suffix."""
    return {
        part.name: {
            suffix: checkpoint_names[name]
            for suffix, name, _ in part.tensor_names()
            if name in checkpoint_names
        }
        for module in quantized
        for part in module.parts
    }


def _expected(model: nn.Module, replaced: Collection[str]) -> dict[str, Slice]:
    """The tensors that a checkpoint of this model has, under the model's names, but for `replaced` ones."""
    packed: Mapping[str, Sequence[str]] = getattr(model, "packed_modules", {})
    canonical: dict[int, str] = {}  # parameters tied to each other count under the first of their names
    expected: dict[str, Slice] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in replaced:
            continue
        target = canonical.setdefault(id(parameter), name)
        path, _, leaf = name.rpartition(".")
        owner, _, module = path.rpartition(".")
        if module not in packed:
            expected[name] = Slice(target, 0, tuple(parameter.shape))
            continue
        sizes = _output_sizes(model.get_submodule(path))
        assert len(sizes) == len(packed[module]), f"{path}: output_sizes does not match packed_modules"
        assert sum(sizes) == parameter.shape[0], f"{name}: output_sizes does not add up to its rows"
        start = 0
        for part, rows in zip(packed[module], sizes, strict=True):
            part_name = ".".join(filter(None, (owner, part, leaf)))
            expected[part_name] = Slice(target, start, (rows, *parameter.shape[1:]))
            start += rows
    return expected


def _output_sizes(module: nn.Module) -> tuple[int, ...]:
    sizes: tuple[int, ...] = module.output_sizes  # type: ignore[assignment]  # nn.Module.__getattr__ says Tensor
    return sizes


def _renamed(names: Collection[str], expected: Collection[str]) -> dict[str, str]:
    """Model name of each checkpoint name. The one place that knows how exports differ in their prefixes."""
    renamings: tuple[Callable[[str], str], ...] = (
        lambda name: name,
        # A base model saved on its own: no "model." before its layers.
        lambda name: name if name in expected else f"model.{name}",
        # DataParallel and torch.compile wrap the model in a module that gives every name a prefix.
        lambda name: name.removeprefix("module."),
        lambda name: name.removeprefix("_orig_mod."),
        # The text part of a model that also sees, as published and as transformers 5 has it in memory.
        lambda name: name.removeprefix("language_model."),
        lambda name: re.sub(r"^model\.language_model\.", "model.", name),
    )
    best = max(renamings, key=lambda rename: sum(rename(name) in expected for name in names))
    renamed: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        model_name = best(name)
        # Where two names meet in one, the second keeps its own and so shows up as unexpected.
        renamed[name] = name if model_name in taken else model_name
        taken.add(renamed[name])
    return renamed
