"""WNA16: integer codes with scales for groups of columns, multiplied with activations as they are."""

import torch

from halimede.engine.quant.canonical import GroupedWeight
from halimede.engine.quant.forms.base import Placement, WeightForm
from halimede.kernels.matmul_bytes import bytes_product, pack_bytes, unpack_bytes
from halimede.kernels.matmul_codes import CodedWeight, codes_product, pack_codes
from halimede.kernels.matmul_int4 import Int4Weight, int4_product, int4_rows, pack_int4


class WNA16(WeightForm):
    """A GroupedWeight. On a CPU in 16 bits it is packed for torch's 4-bit product where there is one for it.

    Other codes of a CPU, and those of models in float32, whose results that would round to bfloat16, are
    unpacked a piece at a time; so are codes that go through a table, and those on other devices.
    """

    packed: torch.Tensor
    byte_rows: torch.Tensor | None
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    offsets: torch.Tensor | None
    table: torch.Tensor | None
    permutation: torch.Tensor | None

    def __init__(self, weight: GroupedWeight, placement: Placement) -> None:
        super().__init__(weight.shape, placement)
        self._planes: str | None = None
        self._hold("permutation", weight.permutation)
        self._hold("byte_rows", None)
        if placement.device.type != "cpu" or weight.table is not None:
            self._hold_codes(weight)
        elif (packed := _packed(weight, placement)) is not None:
            self._planes, self._group_size = packed.planes, packed.group_size
            self._has_offsets = packed.has_offsets
            self._hold("packed", packed.packed)
            self._hold("scales", packed.scales)
        else:
            self._hold("byte_rows", pack_bytes(weight.codes, weight.scales, weight.zero, weight.offsets))

    def _hold_codes(self, weight: GroupedWeight) -> None:
        self._group_size = weight.group_size
        self._hold("codes", pack_codes(weight.codes, weight.bits))
        self._hold("scales", weight.scales)
        self._zero = 0 if isinstance(weight.zero, torch.Tensor) else weight.zero
        self._hold("zeros", weight.zero if isinstance(weight.zero, torch.Tensor) else None)
        self._hold("offsets", weight.offsets)
        self._hold("table", weight.table)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See WeightForm."""
        if self.permutation is not None:
            x = x.index_select(1, self.permutation)
        if self._planes is not None:
            return int4_product(x, self._as_int4(self._planes))
        if self.byte_rows is not None:
            return bytes_product(x, self.byte_rows)
        return codes_product(x, self._as_codes())

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """See WeightForm."""
        if self._planes is not None:
            values = int4_rows(self._as_int4(self._planes), ids)
        elif self.byte_rows is not None:
            values = unpack_bytes(self.byte_rows[ids])
        else:
            values = self._as_codes().dequantize(ids)
        if self.permutation is None:
            return values
        return torch.empty_like(values).index_copy_(1, self.permutation, values)

    def _as_int4(self, planes: str) -> Int4Weight:
        shape = (self.out_features, self.in_features)
        return Int4Weight(self.packed, self.scales, planes, self._group_size, shape, self._has_offsets)

    def _as_codes(self) -> CodedWeight:
        zeros = self._zero if self.zeros is None else self.zeros
        return CodedWeight(self.codes, self._group_size, self.scales, zeros, self.offsets, self.table)


def _packed(weight: GroupedWeight, placement: Placement) -> Int4Weight | None:
    if placement.dtype == torch.float32:
        return None
    return pack_int4(weight.codes, weight.bits, weight.group_size, weight.scales, weight.zero, weight.offsets)
