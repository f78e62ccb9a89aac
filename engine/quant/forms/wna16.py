"""WNA16: integer codes with scales for groups of columns, multiplied with activations as they are."""

import torch

from halimede.engine.quant.canonical import GroupedWeight
from halimede.engine.quant.forms.base import Placement, WeightForm
from halimede.kernels.matmul_codes import CodedWeight, codes_product, pack_codes
from halimede.kernels.matmul_int4 import Int4Weight, int4_product, int4_rows, pack_int4


class WNA16(WeightForm):
    """A GroupedWeight. On a CPU in 16 bits it is packed for torch's 4-bit product where there is one for it.

    Otherwise, and for models in float32, whose results would be rounded to bfloat16, its codes are widened a
    piece at a time.
    """

    packed: torch.Tensor
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
        packed = None
        if placement.device.type == "cpu" and placement.dtype != torch.float32 and weight.table is None:
            packed = pack_int4(
                weight.codes, weight.bits, weight.group_size, weight.scales, weight.zero, weight.offsets
            )
        if packed is not None:
            self._planes, self._group_size = packed.planes, packed.group_size
            self._has_offsets = packed.has_offsets
            self._hold("packed", packed.packed)
            self._hold("scales", packed.scales)
            return
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
        return codes_product(x, self._as_codes())

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """See WeightForm."""
        if self._planes is not None:
            values = int4_rows(self._as_int4(self._planes), ids)
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
