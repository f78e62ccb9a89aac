"""RMSNorm as a layer."""

import torch
from torch import nn

from halimede.engine.layers.linear import empty_parameter
from halimede.kernels.norm import doubled_weight
from halimede.kernels.ops import TORCH, Ops


class RMSNorm(nn.Module):
    """Scales the last dimension to a root mean square of one, then by `weight`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = empty_parameter(size)
        self.eps = eps
        self.ops = TORCH
        self.doubled: torch.Tensor | None
        self.register_buffer("doubled", None, persistent=False)

    def prepare(self, dtype: torch.dtype, ops: Ops) -> None:
        """Widen the weight to activations of `dtype`; a wider one stays as it is."""
        self.ops = ops
        if self.weight.dtype.itemsize < dtype.itemsize:
            self.weight = nn.Parameter(self.weight.to(dtype), requires_grad=False)
        if ops is TORCH and self.weight.device.type == "cpu":
            self.doubled = doubled_weight(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size) -> (..., size)."""
        return self.ops.rms_norm(x, self.weight, self.eps, self.doubled)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Add x to `residual` in place and norm the sum: (T, size) each -> (T, size)."""
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps, self.doubled)
