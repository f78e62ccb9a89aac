"""bitsandbytes checkpoints: NF4 and FP4 codes in blocks, or int8 rows.

4 bits, tensors of a module: weight uint8 [ceil(N K / 2), 1], two codes in a byte with the first in the high
bits, of the elements of W one row after the other; weight.absmax, a scale for each `blocksize` of them;
weight.quant_map float32 [16], what codes stand for; weight.quant_state.bitsandbytes__nf4 (or __fp4), bytes of
JSON. With double quantization absmax is uint8, and a scale is nested_quant_map[absmax] *
nested_absmax[block] + nested_offset, of blocks of nested_blocksize. The bytes of weight may be called a
floating type (bnb_4bit_quant_storage). bitsandbytes rounds the weight to the type that it multiplies in.

8 bits: weight int8 [N, K], SCB float32 [N], W[n, k] = weight[n, k] * SCB[n] / 127. Activations stay as they
are: LLM.int8() rounds them to int8 to be fast, all but columns with outliers, for which it then has to look
at every step. What comes out of both differs by that rounding.

Source: bitsandbytes 0.50, functional.py (QuantState, dequantize_4bit), backends/default/ops.py and
nn/modules.py; of what is left out: transformers, quantizers/base.py (get_modules_to_not_convert).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from halimede.engine.config_fields import ConfigFields
from halimede.engine.quant.canonical import GroupedWeight
from halimede.engine.quant.module_names import is_listed
from halimede.engine.quant.scheme import ModuleKind
from halimede.engine.quant.stored import StoredModule
from halimede.errors import ModelLoadError, UnsupportedQuantizationError

_TYPES = ("nf4", "fp4")
_STORAGE = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)
_INT8_ZERO = 128
_INT8_LARGEST = 127
_ROWS_FORMAT = 0  # of weight_format; others are layouts of GPUs before Hopper


@dataclass(frozen=True, slots=True)
class FourBitFormat:
    """quant_type: "nf4" or "fp4", which the name of one tensor depends on."""

    quant_type: str

    @property
    def required(self) -> Sequence[str]:
        """See WeightFormat."""
        return ("weight", "weight.absmax", "weight.quant_map", self._state_name)

    @property
    def optional(self) -> Sequence[str]:
        """See WeightFormat."""
        return ("weight.nested_absmax", "weight.nested_quant_map")

    @property
    def _state_name(self) -> str:
        return f"weight.quant_state.bitsandbytes__{self.quant_type}"

    def check(self, stored: StoredModule) -> None:
        """See WeightFormat."""
        _packed(stored)
        _table(stored)
        self._scales(stored)

    def convert(self, stored: StoredModule) -> GroupedWeight:
        """See WeightFormat."""
        rows, columns = stored.out_features, stored.in_features
        size, scales = self._scales(stored)
        packed = _packed(stored)
        codes = torch.stack((packed >> 4, packed & 15), -1).view(-1)[: rows * columns]
        return GroupedWeight(
            codes=codes.view(rows, columns),
            bits=4,
            group_size=size,
            scales=scales,
            zero=0,
            table=_table(stored),
        )

    def _scales(self, stored: StoredModule) -> tuple[int, torch.Tensor]:
        """The size of a group, and scales [N, G] float32."""
        rows, columns = stored.out_features, stored.in_features
        state = self._read_state(stored)
        blocks = -(-rows * columns // state.block)
        if state.outer_block is None:
            absmax = stored.scales("weight.absmax", [(blocks,)]).float()
        else:
            absmax = _nested_scales(stored, blocks, state.outer_block, state.offset)
        # Blocks go on from one row to the next where they do not fill it: groups are what both are made of.
        size = math.gcd(state.block, columns)
        groups = rows * columns // size
        return size, absmax.repeat_interleave(state.block // size)[:groups].view(rows, -1)

    def _read_state(self, stored: StoredModule) -> "QuantState":
        suffix, shape = self._state_name, [stored.out_features, stored.in_features]
        size = stored.read(stored.names[suffix]).shape if suffix in stored else (0,)
        data = bytes(stored.get(suffix, [(math.prod(size),)], [torch.uint8]).tolist())
        try:
            fields = json.loads(data)
            if not isinstance(fields, dict):
                raise ValueError("not an object")
            nested = fields.get("nested_blocksize") is not None or "weight.nested_absmax" in stored
            state = QuantState(
                _whole(fields, "blocksize"),
                _whole(fields, "nested_blocksize") if nested else None,
                float(fields["nested_offset"]) if nested else 0.0,
            )
            for part in self.optional if nested else ():
                if part not in stored:
                    raise ValueError(f"its scales are quantized, and there is no {stored.name}.{part}")
            if not math.isfinite(state.offset):
                raise ValueError(f"nested_offset is {state.offset}")
        except (ValueError, KeyError, TypeError) as error:
            raise stored.error(suffix, f"does not describe a quantized weight: {error}") from error
        for name, wanted, where in (("shape", shape, "model"), ("quant_type", self.quant_type, "config")):
            if fields.get(name) != wanted:
                raise stored.error(suffix, f"has {name}={fields.get(name)!r}, and the {where} {wanted!r}")
        return state


@dataclass(frozen=True, slots=True)
class QuantState:
    """block: elements with one scale. outer_block: scales with one scale of theirs, None where they have
    none; offset is added to them."""

    block: int
    outer_block: int | None
    offset: float


def _whole(fields: dict[str, Any], name: str) -> int:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}")
    return value


def _nested_scales(stored: StoredModule, blocks: int, outer_block: int, offset: float) -> torch.Tensor:
    """Scales that are quantized themselves: [blocks] float32."""
    codes = stored.get("weight.absmax", [(blocks,)], [torch.uint8])
    values = stored.scales("weight.nested_quant_map", [(256,)]).float()
    outer = stored.scales("weight.nested_absmax", [(-(-blocks // outer_block),)]).float()
    return values[codes.int()] * outer.repeat_interleave(outer_block)[:blocks] + offset


def _table(stored: StoredModule) -> torch.Tensor:
    """What codes stand for, [16] float32. bitsandbytes stores it, and has the same values itself."""
    return stored.scales("weight.quant_map", [(16,)]).float()


def _packed(stored: StoredModule) -> torch.Tensor:
    """The bytes of the codes: [ceil(N K / 2)] uint8."""
    rows, columns = stored.out_features, stored.in_features
    width = stored.read(stored.names["weight"]).dtype.itemsize if "weight" in stored else 1
    size = -(-rows * columns // 2) // width
    shapes = [(size, 1), (1, size), (size,)]
    if columns % (2 * width) == 0:
        shapes.append((rows, columns // 2 // width))
    return stored.get("weight", shapes, _STORAGE).contiguous().view(-1).view(torch.uint8)


@dataclass(frozen=True, slots=True)
class Int8Format:
    """There is one variant of it."""

    required: Sequence[str] = ("weight", "SCB")
    optional: Sequence[str] = ("weight_format",)

    def check(self, stored: StoredModule) -> None:
        """See WeightFormat."""
        self._tensors(stored)

    def convert(self, stored: StoredModule) -> GroupedWeight:
        """See WeightFormat."""
        weight, scales = self._tensors(stored)
        return GroupedWeight(
            codes=weight.contiguous().view(torch.uint8) ^ _INT8_ZERO,  # adds 128
            bits=8,
            group_size=stored.in_features,
            scales=(scales.float() / _INT8_LARGEST)[:, None],
            zero=_INT8_ZERO,
        )

    def _tensors(self, stored: StoredModule) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = stored.out_features, stored.in_features
        if "weight_format" in stored:
            layout = int(stored.get("weight_format", [(), (1,)], [torch.uint8]))
            if layout != _ROWS_FORMAT:
                raise UnsupportedQuantizationError(
                    f"{stored.where(stored.names['weight_format'])}: the tensor "
                    f"{stored.names['weight_format']} is {layout}, a layout of some GPU's, which is not "
                    f"supported; take a checkpoint with {_ROWS_FORMAT}, rows, which bitsandbytes writes now"
                )
        weight = stored.get("weight", [(rows, columns)], [torch.int8])
        return weight, stored.scales("SCB", [(rows,)])


@dataclass(frozen=True, slots=True)
class BitsAndBytesScheme:
    """All linear modules but those of `excluded`."""

    format: FourBitFormat | Int8Format
    excluded: tuple[str, ...]
    method: str = "bitsandbytes"
    kv_cache_scales: bool = False

    def format_of(self, name: str, kind: ModuleKind) -> FourBitFormat | Int8Format | None:
        """See QuantScheme."""
        if kind != "Linear" or is_listed(name, self.excluded):
            return None
        return self.format


def read(fields: ConfigFields) -> BitsAndBytesScheme:
    """The settings of a quantization_config. Raises as registry.read_scheme.

    Without a list of what is not quantized that is lm_head, as in transformers.
    """
    four, eight = fields.flag("load_in_4bit", False), fields.flag("load_in_8bit", False)
    if four == eight:
        raise ModelLoadError(
            f"{fields.source}: load_in_4bit={four} and load_in_8bit={eight}, of which one must be true; "
            "correct the config"
        )
    quant_type = fields.text("bnb_4bit_quant_type", "fp4").lower()
    if four and quant_type not in _TYPES:
        raise UnsupportedQuantizationError(
            f"{fields.source}: bnb_4bit_quant_type {quant_type!r} is not supported; take a checkpoint with "
            f"{' or '.join(map(repr, _TYPES))}"
        )
    name = "llm_int8_skip_modules"
    return BitsAndBytesScheme(
        FourBitFormat(quant_type) if four else Int8Format(),
        fields.texts(name) if fields.has(name) else ("lm_head",),
    )
