"""compressed-tensors checkpoints: which of its groups, and so which format, each module is of.

config_groups names groups of modules by targets: a module's name, "re:" and an expression that begins it, or
a class ("Linear"); those on the list `ignore`, in the same terms, are plain. Of several targets that fit, a
name goes before an expression, that before a class, and otherwise the first by the alphabet. A group's own
format goes before the config's; where neither says more than "mixed-precision", the group's arguments tell.

Source: compressed-tensors, quantization/quant_config.py, quant_args.py, lifecycle/apply.py, utils/match.py
and compressors/format.py.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from halimede.engine.config_fields import ConfigFields
from halimede.engine.quant.ct_formats import Grouping, IntegerFormat, Mxfp4Format, PackedFormat, W8A8Format
from halimede.engine.quant.fp8 import Fp8Format
from halimede.engine.quant.module_names import spellings
from halimede.engine.quant.scheme import ModuleKind, WeightFormat
from halimede.errors import ModelLoadError, UnsupportedQuantizationError

_logger = logging.getLogger(__name__)

_EXPRESSION = "re:"
_MIXED = ("", "mixed-precision")
_STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group")
_SUPPORTED = (
    "pack-quantized (2 to 8 bits), int-quantized (8 bits and fewer, with or without int8 activations), "
    "float-quantized (FP8), naive-quantized, mxfp8-quantized and mxfp4-pack-quantized"
)


@dataclass(frozen=True, slots=True)
class CompressedTensorsScheme:
    """targets: each with the format of its group, None for one whose weights are plain."""

    targets: Mapping[str, WeightFormat | None]
    ignore: tuple[str, ...]
    kv_cache_scales: bool
    method: str = "compressed-tensors"

    def format_of(self, name: str, kind: ModuleKind) -> WeightFormat | None:
        """See QuantScheme."""
        if any(_is_named(name, entry) or entry == kind for entry in self.ignore):
            return None
        ordered = sorted(self.targets, key=lambda target: (target.startswith(_EXPRESSION), target))
        fitting = [target for target in ordered if _is_named(name, target)]
        fitting += [target for target in ordered if target == kind]
        return self.targets[fitting[0]] if fitting else None


def _is_named(name: str, target: str) -> bool:
    if target.startswith(_EXPRESSION):
        expression = target.removeprefix(_EXPRESSION)
        return any(re.match(expression, spelling) for spelling in spellings(name))
    return target in spellings(name)


@dataclass(frozen=True, slots=True)
class QuantArgs:
    """How weights or activations are quantized. kind: "int" or "float". group_size: for strategy "group"."""

    bits: int
    kind: str
    symmetric: bool
    strategy: str
    group_size: int | None
    block: tuple[int, int] | None
    dynamic: bool
    act_order: bool

    def __str__(self) -> str:
        facts = [self.strategy if self.group_size is None else f"{self.strategy} of {self.group_size}"]
        facts += [] if self.symmetric else ["asymmetric"]
        facts += ["dynamic"] if self.dynamic else []
        return f"{self.kind}{self.bits} ({', '.join(facts)})"


def read(fields: ConfigFields) -> CompressedTensorsScheme:
    """The settings of a quantization_config or a compression_config. Raises as registry.read_scheme."""
    inner = fields.section("quantization_config") or fields  # as the first releases nested them
    for part in (fields, inner):
        _refuse_transforms(part)
    targets: dict[str, WeightFormat | None] = {}
    groups = inner.section("config_groups")
    for name in groups.names() if groups else ():
        assert groups is not None, "it has names"
        group = groups.section(name)
        if group is not None:
            format_ = _format_of_group(group, inner.text("format", ""))
            targets |= dict.fromkeys(_checked(group.texts("targets"), group), format_)
    ignore = _checked(inner.texts("ignore"), inner)
    return CompressedTensorsScheme(targets, ignore, inner.has("kv_cache_scheme"))


def _refuse_transforms(fields: ConfigFields) -> None:
    sparsity = fields.section("sparsity_config")
    if sparsity is not None and sparsity.text("format", "dense") != "dense":
        raise UnsupportedQuantizationError(
            f"{sparsity.source}: weights stored as {sparsity.text('format')!r} are not supported; take a "
            "checkpoint whose sparsity format is 'dense'"
        )
    if fields.section("transform_config") is not None:
        raise UnsupportedQuantizationError(
            f"{fields.source}: transform_config, which rotates activations, is not supported; take a "
            "checkpoint without"
        )


def _checked(names: Iterable[str], fields: ConfigFields) -> tuple[str, ...]:
    """The names; ModelLoadError where an expression among them cannot be read."""
    for name in names:
        try:
            re.compile(name.removeprefix(_EXPRESSION) if name.startswith(_EXPRESSION) else "")
        except re.error as error:
            raise ModelLoadError(
                f"{fields.source}: {name!r} is not a regular expression ({error}); correct the config"
            ) from error
    return tuple(names)


def _format_of_group(group: ConfigFields, format_: str) -> WeightFormat | None:
    """The format of a group's weights; None where they are plain."""
    fields, inputs = group.section("weights"), group.section("input_activations")
    if fields is None:
        return None
    weights, activations = _read_args(fields), None if inputs is None else _read_args(inputs)
    outputs = group.section("output_activations")
    if outputs is not None:
        _logger.warning("%s is ignored: outputs stay as they are", outputs.source)
    unread = () if outputs is None else ("output_scale", "output_zero_point")
    own = group.text("format", format_)
    if own in _MIXED:
        own = _inferred(weights, activations)
    found: WeightFormat | None = None
    if weights.kind == "int" and not weights.dynamic:
        found = _integers(weights, activations, own, unread)
    elif weights.symmetric and (activations is None or activations.kind == "float"):
        found = _floats(weights, activations, own, unread)
    if found is None:
        raise UnsupportedQuantizationError(
            f"{group.source}: {weights} weights with {activations or 'no'} activations as {own!r} are not "
            f"supported; supported: {_SUPPORTED}"
        )
    return found


def _read_args(fields: ConfigFields) -> QuantArgs:
    kind, block = fields.text("type", "int").lower(), fields.numbers("block_structure")
    if kind not in ("int", "float"):
        raise fields.wrong("type", kind, "'int' or 'float'")
    if block and (len(block) != 2 or any(size != int(size) for size in block)):
        raise fields.wrong("block_structure", list(block), "the rows and columns of a block")
    size = fields.integer("group_size", minimum=-1) if fields.has("group_size") else None
    inferred = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = fields.text("strategy", inferred).lower()
    if strategy not in _STRATEGIES:
        raise fields.wrong("strategy", strategy, f"one of {', '.join(_STRATEGIES)}")
    if strategy in ("group", "tensor_group"):
        size = fields.integer("group_size")
    if (strategy == "block") != bool(block):
        raise fields.wrong("block_structure", list(block), "there for strategy='block' and no other")
    return QuantArgs(
        bits=fields.integer("num_bits", 8),
        kind=kind,
        symmetric=fields.flag("symmetric", True),
        strategy=strategy,
        group_size=size if strategy in ("group", "tensor_group") else None,
        block=(int(block[0]), int(block[1])) if block else None,
        # "local" is NVFP4's alone
        dynamic=strategy != "tensor_group" and fields.flag("dynamic", False),
        act_order=_is_act_order(fields),
    )


def _is_act_order(fields: ConfigFields) -> bool:
    try:
        return fields.text("actorder", "").lower() in ("group", "dynamic")
    except ModelLoadError:  # true, in the first releases, for group
        return fields.flag("actorder")


def _inferred(weights: QuantArgs, activations: QuantArgs | None) -> str:
    """The format that the package gives a group of these arguments."""
    if weights.kind == "int":
        return "pack-quantized" if activations is None else "int-quantized"
    if weights.bits == 4:
        return "mxfp4-pack-quantized" if weights.group_size == 32 else "nvfp4-pack-quantized"
    return "mxfp8-quantized" if weights.group_size == 32 else "float-quantized"


def _integers(
    weights: QuantArgs, activations: QuantArgs | None, format_: str, unread: tuple[str, ...]
) -> WeightFormat | None:
    """The format of integer weights; None where it is not supported."""
    if weights.strategy not in ("tensor", "channel", "group") or not 2 <= weights.bits <= 8:
        return None
    grouping = Grouping(weights.group_size, weights.strategy == "tensor")
    if format_ == "pack-quantized" and activations is None:
        return PackedFormat(weights.bits, grouping, weights.symmetric, weights.act_order, unread)
    if format_ not in ("int-quantized", "naive-quantized") or weights.act_order:
        return None
    if activations is None:
        return IntegerFormat(weights.bits, grouping, weights.symmetric, unread)
    of_token = activations.strategy == "token" and activations.dynamic
    static = activations.strategy == "tensor" and not activations.dynamic
    fits = (activations.kind, activations.bits) == ("int", 8) and (of_token or static)
    if not fits or not weights.symmetric or weights.strategy == "group":
        return None
    return W8A8Format(weights.bits, grouping, static, activations.symmetric, unread)


def _floats(
    weights: QuantArgs, activations: QuantArgs | None, format_: str, unread: tuple[str, ...]
) -> WeightFormat | None:
    """The format of floating weights, whose activations stay as they are; None where it is not supported."""
    if format_ == "mxfp4-pack-quantized" and (weights.bits, weights.group_size) == (4, 32):
        return Mxfp4Format(unread)
    if format_ not in ("float-quantized", "naive-quantized", "mxfp8-quantized") or weights.bits != 8:
        return None
    if weights.strategy not in ("tensor", "channel", "group", "block"):
        return None
    static = activations is not None and not activations.dynamic
    if static and activations is not None and activations.strategy != "tensor":
        return None
    return Fp8Format(
        block=(1, weights.group_size) if weights.group_size else weights.block,
        input_names=("input_scale",) if static else (),
        unread=unread,
    )
