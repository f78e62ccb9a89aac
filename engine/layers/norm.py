"""RMSNorm as a layer."""

import torch
from torch import nn

from halimede.engine.layers.linear import Linear, empty_parameter
from halimede.engine.quant.forms.base import ActivationQuant, Activations, QuantizedActivations
from halimede.kernels.norm import doubled_weight
from halimede.kernels.ops import TORCH, Ops


class RMSNorm(nn.Module):
    """Scales the last dimension to a root mean square of one, then by `weight`.

    What goes into a product alone may come out rounded as that product wants it: `feeds` says which one it
    is, `for_product` and `add_for_product` then do both in one kernel, where there is one.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = empty_parameter(size)
        self.eps = eps
        self.ops = TORCH
        self._quant: ActivationQuant | None = None
        self.doubled: torch.Tensor | None
        self.register_buffer("doubled", None, persistent=False)

    def prepare(self, dtype: torch.dtype, ops: Ops) -> None:
        """Widen the weight to activations of `dtype`; a wider one stays as it is."""
        self.ops = ops
        if self.weight.dtype.itemsize < dtype.itemsize:
            self.weight = nn.Parameter(self.weight.to(dtype), requires_grad=False)
        if ops is TORCH and self.weight.device.type == "cpu":
            self.doubled = doubled_weight(self.weight)

    def feeds(self, linear: Linear) -> None:
        """Say what for_product is for. After both are prepared."""
        self._quant = None if linear.form is None else linear.form.quantizes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size) -> (..., size)."""
        return self.ops.rms_norm(x, self.weight, self.eps, self.doubled)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Add x to `residual` in place and norm the sum: (T, size) each -> (T, size)."""
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps, self.doubled)

    def for_product(self, x: torch.Tensor) -> Activations:
        """As forward (T, size), for the product that `feeds` named."""
        kernel, quant = self.ops.rms_norm_quant, self._quant
        if kernel is None or quant is None:
            return self.forward(x)
        codes, scales = kernel(x, self.weight, self.eps, quant.dtype, quant.group_size, quant.scale)
        return QuantizedActivations(codes, scales, x.dtype)

    def add_for_product(self, x: torch.Tensor, residual: torch.Tensor) -> Activations:
        """As add, for the product that `feeds` named."""
        kernel, quant = self.ops.add_rms_norm_quant, self._quant
        if kernel is None or quant is None:
            return self.add(x, residual)
        codes, scales = kernel(x, residual, self.weight, self.eps, quant.dtype, quant.group_size, quant.scale)
        return QuantizedActivations(codes, scales, x.dtype)
