"""RMSNorm as a layer."""

import torch
from torch import nn

from halimede.engine.layers.linear import empty_parameter
from halimede.kernels.norm import add_rms_norm, doubled_weight, rms_norm


class RMSNorm(nn.Module):
    """Scales the last dimension to a root mean square of one, then by `weight`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = empty_parameter(size)
        self.eps = eps
        self.doubled: torch.Tensor | None
        self.register_buffer("doubled", None, persistent=False)

    def prepare(self, dtype: torch.dtype) -> None:
        """Widen the weight to activations of `dtype`; a wider one stays as it is."""
        if self.weight.dtype.itemsize < dtype.itemsize:
            self.weight = nn.Parameter(self.weight.to(dtype), requires_grad=False)
        if self.weight.device.type == "cpu":
            self.doubled = doubled_weight(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size) -> (..., size)."""
        return rms_norm(x, self.weight, self.eps, self.doubled)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Add x to `residual` in place and norm the sum: (T, size) each -> (T, size)."""
        return add_rms_norm(x, residual, self.weight, self.eps, self.doubled)
