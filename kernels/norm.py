"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, alone or after a residual add.

Layouts: x (..., hidden) with unit stride in the last dimension, weight (hidden).
The norm is computed in float32 and rounded to x's dtype before the product with weight, as Hugging Face's
models do: checkpoints were trained with that rounding.
"""

import torch


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The oracle of rms_norm: float64 inside, rounded once."""
    wide = x.double()
    wide = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return wide.to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm x (..., hidden) by weight (hidden); x is not changed."""
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight)


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle of add_rms_norm: (norm, sum), nothing changed in place."""
    total = (x.double() + residual.double()).to(x.dtype)
    return rms_norm_reference(total, weight, eps), total


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add x (T, hidden) to `residual` (T, hidden) in place and return the norm of the sum."""
    return rms_norm(residual.add_(x), weight, eps)
