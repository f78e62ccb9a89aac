"""How compressed-tensors stores a weight, by the name of the format.

Tensors of a module; S is the shape of its scales: [N, K / group_size], [N, 1] for channels, [1] for all.
    pack-quantized    weight_packed int32 [N, ceil(K * bits / 32)], codes q + 2^(bits - 1) one after another;
                      weight_scale S, weight_shape [2]; if not symmetric weight_zero_point int32
                      [ceil(N * bits / 32), S[1]], packed as the weight but along N, or int8 [1] for all;
                      with act-order weight_g_idx int32 [K], each column's group (-1: in their order)
    int-quantized     weight int8 [N, K], weight_scale S; if not symmetric weight_zero_point int8 S; with
                      static activations input_scale [1] and, if not symmetric, input_zero_point int8 [1]
    mxfp4-pack-quantized    weight_packed uint8 [N, K / 2], weight_scale uint8 [N, K / 32]
W = (q - zero_point) * scale. float-quantized is fp8.py's.

Source: compressed-tensors, compressors/; its release 0.9 for weight_g_idx.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from halimede.engine.quant.canonical import GroupedWeight, Int8Weight
from halimede.engine.quant.mxfp4 import mxfp4_weight, read_exponents
from halimede.engine.quant.packing import unpack_dense, unpack_words
from halimede.engine.quant.stored import StoredModule

_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, slots=True)
class Grouping:
    """Which columns share a scale. group_size: None is all of a row. per_tensor: one scale for all rows."""

    group_size: int | None = None
    per_tensor: bool = False

    def groups(self, stored: StoredModule) -> int:
        """Groups in a row."""
        return 1 if self.group_size is None else stored.whole_groups(self.group_size)

    def shapes(self, stored: StoredModule) -> list[tuple[int, ...]]:
        """The shapes that scales may have."""
        rows, groups = stored.out_features, self.groups(stored)
        if self.per_tensor:
            return [(1,), (), (1, 1)]
        return [(rows, groups), (rows,)] if groups == 1 else [(rows, groups)]

    def spread(self, tensor: torch.Tensor, stored: StoredModule) -> torch.Tensor:
        """[N, G], a copy for each row where there is one for all."""
        shape = stored.out_features, self.groups(stored)
        return tensor.reshape(1, 1).expand(shape).contiguous() if self.per_tensor else tensor.reshape(shape)


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """pack-quantized. act_order: weight_g_idx must be there. unread: tensors that may be there too."""

    bits: int
    grouping: Grouping
    symmetric: bool
    act_order: bool
    unread: tuple[str, ...] = ()

    @property
    def required(self) -> Sequence[str]:
        """See WeightFormat."""
        suffixes = ["weight_packed", "weight_scale"]
        suffixes += [] if self.symmetric else ["weight_zero_point"]
        return [*suffixes, "weight_g_idx"] if self.act_order else suffixes

    @property
    def optional(self) -> Sequence[str]:
        """See WeightFormat."""
        return ["weight_shape", *([] if self.act_order else ["weight_g_idx"]), *self.unread]

    def check(self, stored: StoredModule) -> None:
        """See WeightFormat."""
        self._tensors(stored)
        self._order(stored)

    def convert(self, stored: StoredModule) -> GroupedWeight:
        """See WeightFormat."""
        words, scales, zero_point = self._tensors(stored)
        codes = _unpack(words, self.bits, stored.in_features)
        zero: torch.Tensor | int = 1 << (self.bits - 1)
        if zero_point is not None and self.grouping.per_tensor:
            zero = self.grouping.spread(zero_point.int() + zero, stored)
        elif zero_point is not None:
            zero = _unpack(zero_point.t(), self.bits, stored.out_features).t().contiguous()
        order = self._order(stored)
        return GroupedWeight(
            codes=codes if order is None else codes[:, order],
            bits=self.bits,
            group_size=self.grouping.group_size or stored.in_features,
            scales=self.grouping.spread(scales, stored),
            zero=zero,
            permutation=order,
        )

    def _tensors(self, stored: StoredModule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        rows, columns = stored.out_features, stored.in_features
        if "weight_shape" in stored:
            shape = stored.get("weight_shape", [(2,)], [torch.int64, torch.int32]).tolist()
            if shape != [rows, columns]:
                raise stored.error("weight_shape", f"says {shape}, the model has [{rows}, {columns}]")
        scales = stored.scales("weight_scale", self.grouping.shapes(stored))
        words = stored.get("weight_packed", [(rows, _words(columns, self.bits))], [torch.int32])
        if self.symmetric:
            return words, scales, None
        if self.grouping.per_tensor:
            return words, scales, stored.get("weight_zero_point", [(1,), (), (1, 1)], _INTEGERS)
        packed = (_words(rows, self.bits), self.grouping.groups(stored))
        return words, scales, stored.get("weight_zero_point", [packed], [torch.int32])

    def _order(self, stored: StoredModule) -> torch.Tensor | None:
        """The columns by their group; None where they lie so."""
        if "weight_g_idx" not in stored or self.grouping.group_size is None:
            return None
        columns, size = stored.in_features, self.grouping.group_size
        groups = stored.get("weight_g_idx", [(columns,)], [torch.int32, torch.int64]).long()
        if bool((groups == -1).all()):
            return None
        order = torch.argsort(groups, stable=True)
        whole = torch.arange(columns) // size
        if not torch.equal(groups[order], whole):
            raise stored.error("weight_g_idx", f"does not give each group {size} of the {columns} columns")
        return None if torch.equal(groups, whole) else order


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 words of each row to uint8 [R, count]."""
    if 32 % bits:
        return unpack_dense(words, bits, count)
    return unpack_words(words, bits, dim=1)[:, :count]


@dataclass(frozen=True, slots=True)
class IntegerFormat:
    """int-quantized or naive-quantized without activations: a byte for each code of 8 bits or fewer."""

    bits: int
    grouping: Grouping
    symmetric: bool
    unread: tuple[str, ...] = ()

    @property
    def required(self) -> Sequence[str]:
        """See WeightFormat."""
        return (
            ("weight", "weight_scale") if self.symmetric else ("weight", "weight_scale", "weight_zero_point")
        )

    @property
    def optional(self) -> Sequence[str]:
        """See WeightFormat."""
        return self.unread

    def check(self, stored: StoredModule) -> None:
        """See WeightFormat."""
        self._tensors(stored)

    def convert(self, stored: StoredModule) -> GroupedWeight:
        """See WeightFormat."""
        weight, scales, zero_point = self._tensors(stored)
        check_range(stored, weight, self.bits)
        middle = 1 << (self.bits - 1)
        zero: torch.Tensor | int = middle
        if zero_point is not None:
            zero = self.grouping.spread(zero_point.int() + middle, stored)
        return GroupedWeight(
            codes=(weight.to(torch.int16) + middle).to(torch.uint8),
            bits=self.bits,
            group_size=self.grouping.group_size or stored.in_features,
            scales=self.grouping.spread(scales, stored),
            zero=zero,
        )

    def _tensors(self, stored: StoredModule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        shapes = self.grouping.shapes(stored)
        weight = stored.get("weight", [(stored.out_features, stored.in_features)], [torch.int8])
        scales = stored.scales("weight_scale", shapes)
        return weight, scales, None if self.symmetric else stored.get("weight_zero_point", shapes, _INTEGERS)


def check_range(stored: StoredModule, weight: torch.Tensor, bits: int) -> None:
    """ModelLoadError where codes of a byte have more bits than they should."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    bad = int(((weight < low) | (weight > high)).sum())
    if bad:
        raise stored.error("weight", f"has {bad} codes outside {low}..{high}, which {bits} bits cannot hold")


@dataclass(frozen=True, slots=True)
class W8A8Format:
    """int-quantized with activations of 8 bits. static: their scale is stored, and any zero of theirs."""

    bits: int
    grouping: Grouping
    static: bool
    symmetric_inputs: bool
    unread: tuple[str, ...] = ()

    @property
    def required(self) -> Sequence[str]:
        """See WeightFormat."""
        inputs = ["input_scale"] if self.symmetric_inputs else ["input_scale", "input_zero_point"]
        return ["weight", "weight_scale", *(inputs if self.static else [])]

    @property
    def optional(self) -> Sequence[str]:
        """See WeightFormat."""
        return self.unread

    def check(self, stored: StoredModule) -> None:
        """See WeightFormat."""
        self._tensors(stored)
        self._inputs(stored)

    def convert(self, stored: StoredModule) -> Int8Weight:
        """See WeightFormat."""
        weight, scales = self._tensors(stored)
        check_range(stored, weight, self.bits)
        scale, zero = self._inputs(stored)
        spread = self.grouping.spread(scales.float(), stored)[:, 0].contiguous()
        return Int8Weight(weight, spread, self.symmetric_inputs, scale, zero)

    def _tensors(self, stored: StoredModule) -> tuple[torch.Tensor, torch.Tensor]:
        weight = stored.get("weight", [(stored.out_features, stored.in_features)], [torch.int8])
        return weight, stored.scales("weight_scale", self.grouping.shapes(stored))

    def _inputs(self, stored: StoredModule) -> tuple[torch.Tensor | None, int]:
        """The activations' scale and zero."""
        if not self.static:
            return None, 0
        scale = stored.scales("input_scale", [(1,), ()]).float().reshape(1)
        if not bool(scale > 0):
            raise stored.error("input_scale", f"is {float(scale):g}, which activations cannot be divided by")
        if self.symmetric_inputs:
            return scale, 0
        zero = int(stored.get("input_zero_point", [(1,), ()], _INTEGERS))
        if not -128 <= zero <= 127:
            raise stored.error("input_zero_point", f"is {zero}, outside -128..127")
        return scale, zero


@dataclass(frozen=True, slots=True)
class Mxfp4Format:
    """mxfp4-pack-quantized. Activations stay as they are."""

    unread: tuple[str, ...] = ()

    @property
    def required(self) -> Sequence[str]:
        """See WeightFormat."""
        return ("weight_packed", "weight_scale")

    @property
    def optional(self) -> Sequence[str]:
        """See WeightFormat."""
        return self.unread

    def check(self, stored: StoredModule) -> None:
        """See WeightFormat."""
        self._tensors(stored)

    def convert(self, stored: StoredModule) -> GroupedWeight:
        """See WeightFormat."""
        return mxfp4_weight(*self._tensors(stored))

    def _tensors(self, stored: StoredModule) -> tuple[torch.Tensor, torch.Tensor]:
        exponents = read_exponents(stored, "weight_scale")
        shape = (stored.out_features, stored.in_features // 2)
        return stored.get("weight_packed", [shape], [torch.uint8]), exponents
