"""W8A8: int8 weights times int8 activations, which are rounded on the way in."""

import torch

from halimede.engine.quant.canonical import Int8Weight
from halimede.engine.quant.forms.base import Activations, Placement, WeightForm
from halimede.kernels.matmul_int8 import int8_product, quantize_static, quantize_tokens


class W8A8(WeightForm):
    """An Int8Weight. A zero point of the activations comes off with the sums of W's rows."""

    codes: torch.Tensor
    scales: torch.Tensor
    static_scale: torch.Tensor | None
    sums: torch.Tensor | None

    def __init__(self, weight: Int8Weight, placement: Placement) -> None:
        super().__init__(weight.shape, placement)
        self._symmetric, self._static_zero = weight.symmetric, weight.static_zero
        self._hold("codes", weight.weight)
        self._hold("scales", weight.scales.float())
        self._hold("static_scale", weight.static_scale)
        has_zeros = not weight.symmetric or weight.static_zero != 0
        self._hold("sums", weight.weight.sum(1, dtype=torch.int32) if has_zeros else None)

    def forward(self, x: Activations) -> torch.Tensor:
        """See WeightForm."""
        assert isinstance(x, torch.Tensor), "this form rounds activations itself"
        if self.static_scale is not None:
            codes = quantize_static(x, self.static_scale, self._static_zero)
            y = int8_product(codes, self.codes, self._static_zero, self.sums)
            return y.mul_(self.static_scale * self.scales).to(x.dtype)
        codes, scales, zeros = quantize_tokens(x, symmetric=self._symmetric)
        return int8_product(codes, self.codes, zeros, self.sums).mul_(scales).mul_(self.scales).to(x.dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """See WeightForm."""
        return self.codes[ids].float() * self.scales[ids][:, None]
