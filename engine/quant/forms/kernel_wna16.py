"""WNA16 laid out for the Triton kernels. Imports triton, so it is imported where that is installed only."""

import torch

from halimede.engine.quant.canonical import GroupedWeight
from halimede.engine.quant.forms.base import Placement
from halimede.engine.quant.forms.wna16 import WNA16Form
from halimede.kernels.gpu.wna16_layout import (
    WNA16Operand,
    gated_operand,
    pack_wna16,
    rows_of,
    supports_groups,
)
from halimede.kernels.launch import target_of
from halimede.kernels.matmul_wna16 import ROW_BUCKETS, wna16_product
from halimede.kernels.ops import Gate

__all__ = ["KernelWNA16", "supports_groups"]


class KernelWNA16(WNA16Form):
    """Laid out for the Triton kernels (kernels/gpu/wna16_matmul.py)."""

    words: torch.Tensor
    records: torch.Tensor
    table: torch.Tensor | None
    counters: torch.Tensor

    def __init__(self, weight: GroupedWeight, placement: Placement) -> None:
        super().__init__(weight, placement)
        self._activation: Gate | None = None
        device = placement.device
        zero, offsets, table = weight.zero, weight.offsets, weight.table
        codes = weight.codes.to(device)  # moved first: laying out is some passes over them
        self._take(
            pack_wna16(
                codes,
                weight.bits,
                weight.group_size,
                weight.scales.to(device),
                zero.to(device) if isinstance(zero, torch.Tensor) else zero,
                None if offsets is None else offsets.to(device),
                None if table is None else table.to(device),
                backend=target_of(codes).backend,
            )
        )

    def _take(self, operand: WNA16Operand) -> None:
        self._facts = operand.facts
        for name in ("words", "records", "table", "counters"):
            self._hold(name, getattr(operand, name))

    @property
    def row_buckets(self) -> tuple[int, ...]:
        """See WeightForm."""
        return ROW_BUCKETS

    def take_bias(self, bias: torch.Tensor) -> bool:
        """See WeightForm."""
        if self._activation is not None:  # whose rows are in another order
            return False
        self._hold("bias", bias)
        return True

    def make_gated(self, activation: Gate) -> bool:
        """See WeightForm."""
        if self.out_features % 16 or self.bias is not None or self._activation is not None:
            return False
        self._take(gated_operand(self._operand))
        self._activation = activation
        return True

    @property
    def _operand(self) -> WNA16Operand:
        return WNA16Operand(self.words, self.records, self.table, self.counters, self._facts)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return wna16_product(x, self._operand, self.bias, activation=self._activation)

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        return rows_of(self._operand, ids)
