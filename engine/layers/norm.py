"""RMSNorm as a layer."""

import torch
from torch import nn

from halimede.engine.layers.linear import empty_parameter
from halimede.kernels.norm import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """Scales the last dimension to a root mean square of one, then by `weight`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = empty_parameter(size)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size) -> (..., size)."""
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Add x to `residual` in place and norm the sum: (T, size) each -> (T, size)."""
        return add_rms_norm(x, residual, self.weight, self.eps)
