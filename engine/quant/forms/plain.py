"""A weight that is not quantized, where parts of the same fused module are."""

import torch

from halimede.engine.quant.canonical import PlainWeight
from halimede.engine.quant.forms.base import Activations, Placement, WeightForm
from halimede.kernels.matmul import matmul


class Plain(WeightForm):
    """A PlainWeight in the model's type."""

    weight: torch.Tensor

    def __init__(self, weight: PlainWeight, placement: Placement) -> None:
        super().__init__(weight.shape, placement)
        self._hold("weight", weight.weight.to(placement.dtype))

    def forward(self, x: Activations) -> torch.Tensor:
        """See WeightForm."""
        assert isinstance(x, torch.Tensor), "these activations are never quantized"
        if x.device.type == "cpu":
            return matmul(x, None, self.weight, None)
        return torch.nn.functional.linear(x, self.weight)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """See WeightForm."""
        return self.weight[ids].float()
