"""FP8: float8_e4m3fn weights with scales for tensors, rows or blocks."""

import torch

from halimede.engine.quant.canonical import Fp8Weight
from halimede.engine.quant.forms.base import Activations, Placement, WeightForm
from halimede.kernels.matmul_fp8 import dequantize_fp8, fp8_product


class FP8(WeightForm):
    """An Fp8Weight. Its values are widened to the activations' type, which stay as they are."""

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(self, weight: Fp8Weight, placement: Placement) -> None:
        super().__init__(weight.shape, placement)
        self._block = weight.block
        self._hold("codes", weight.weight)
        self._hold("scales", weight.scales.float())

    def forward(self, x: Activations) -> torch.Tensor:
        """See WeightForm."""
        assert isinstance(x, torch.Tensor), "this form rounds activations itself"
        return fp8_product(x, self.codes, self.scales, self._block)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """See WeightForm."""
        return dequantize_fp8(self.codes, self.scales, self._block, ids)
