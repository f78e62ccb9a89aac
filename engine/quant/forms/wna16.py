"""WNA16: integer codes with scales for groups of columns, multiplied with activations as they are."""

import torch

from halimede.engine.quant.canonical import GroupedWeight
from halimede.engine.quant.forms.base import Activations, Placement, WeightForm
from halimede.kernels.matmul_bytes import bytes_product, pack_bytes, unpack_bytes
from halimede.kernels.matmul_codes import CodedWeight, codes_product, pack_codes
from halimede.kernels.matmul_int4 import Int4Weight, int4_product, int4_rows, pack_int4


def wna16_form(weight: GroupedWeight, placement: Placement) -> WeightForm:
    """The form of a weight for its device.

    On a GPU the Triton kernels' where they have a layout for the groups; on a CPU in 16 bits packed for
    torch's 4-bit product where there is one for the codes. Others, those of models in float32, whose
    results the latter would round to bfloat16, and codes that go through a table there, are unpacked a
    piece at a time.
    """
    if placement.has_kernels and placement.dtype.itemsize == 2:
        from halimede.engine.quant.forms.kernel_wna16 import KernelWNA16, supports_groups

        if supports_groups(weight.group_size, weight.shape[1]):
            return KernelWNA16(weight, placement)
    if placement.device.type != "cpu" or weight.table is not None:
        return CodedWNA16(weight, placement)
    packed = _packed(weight, placement)
    return BytesWNA16(weight, placement) if packed is None else PackedWNA16(weight, placement, packed)


class WNA16Form(WeightForm):
    """What all have in common: columns in another order than the activations', where act-order asked for
    it."""

    permutation: torch.Tensor | None

    def __init__(self, weight: GroupedWeight, placement: Placement) -> None:
        super().__init__(weight.shape, placement)
        self._hold("permutation", weight.permutation)

    def forward(self, x: Activations) -> torch.Tensor:
        """See WeightForm."""
        assert isinstance(x, torch.Tensor), "these activations are never quantized"
        return self._product(x if self.permutation is None else x.index_select(1, self.permutation))

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """See WeightForm."""
        values = self._rows(ids)
        if self.permutation is None:
            return values
        return torch.empty_like(values).index_copy_(1, self.permutation, values)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class CodedWNA16(WNA16Form):
    """Codes as they are, unpacked a piece at a time by torch (kernels/matmul_codes.py)."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    offsets: torch.Tensor | None
    table: torch.Tensor | None

    def __init__(self, weight: GroupedWeight, placement: Placement) -> None:
        super().__init__(weight, placement)
        self._group_size = weight.group_size
        self._hold("codes", pack_codes(weight.codes, weight.bits))
        self._hold("scales", weight.scales)
        self._zero = 0 if isinstance(weight.zero, torch.Tensor) else weight.zero
        self._hold("zeros", weight.zero if isinstance(weight.zero, torch.Tensor) else None)
        self._hold("offsets", weight.offsets)
        self._hold("table", weight.table)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return codes_product(x, self._coded)

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self._coded.dequantize(ids)

    @property
    def _coded(self) -> CodedWeight:
        zeros = self._zero if self.zeros is None else self.zeros
        return CodedWeight(self.codes, self._group_size, self.scales, zeros, self.offsets, self.table)


class PackedWNA16(WNA16Form):
    """Packed for torch's 4-bit product on a CPU (kernels/matmul_int4.py)."""

    packed: torch.Tensor
    scales: torch.Tensor

    def __init__(self, weight: GroupedWeight, placement: Placement, packed: Int4Weight) -> None:
        super().__init__(weight, placement)
        self._planes, self._group_size = packed.planes, packed.group_size
        self._has_offsets = packed.has_offsets
        self._hold("packed", packed.packed)
        self._hold("scales", packed.scales)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return int4_product(x, self._as_int4)

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        return int4_rows(self._as_int4, ids)

    @property
    def _as_int4(self) -> Int4Weight:
        shape = (self.out_features, self.in_features)
        return Int4Weight(self.packed, self.scales, self._planes, self._group_size, shape, self._has_offsets)


class BytesWNA16(WNA16Form):
    """Rows of bytes for FBGEMM on a CPU (kernels/matmul_bytes.py)."""

    byte_rows: torch.Tensor

    def __init__(self, weight: GroupedWeight, placement: Placement) -> None:
        super().__init__(weight, placement)
        self._hold("byte_rows", pack_bytes(weight.codes, weight.scales, weight.zero, weight.offsets))

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return bytes_product(x, self.byte_rows)

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        return unpack_bytes(self.byte_rows[ids])


def _packed(weight: GroupedWeight, placement: Placement) -> Int4Weight | None:
    if placement.dtype == torch.float32:
        return None
    return pack_int4(weight.codes, weight.bits, weight.group_size, weight.scales, weight.zero, weight.offsets)
