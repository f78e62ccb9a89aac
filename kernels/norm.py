"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, alone or after a residual add.

Layouts: x (..., hidden) with unit stride in the last dimension, weight (hidden).
The norm is computed in float32 and rounded to x's dtype before the product with weight, as Hugging Face's
models do: checkpoints were trained with that rounding. A float32 weight under a 16-bit x is Gemma's way: the
product comes first, the rounding after it. So it does for few rows on a CPU, where operations count more than
what they compute.
"""

import functools

import torch
import torch.nn.functional as F

FEW_ROWS = 16
"""Rows up to which a step of decoding is bound by the number of operations, not by what they compute."""


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The oracle of rms_norm: float64 inside, rounded once."""
    wide = x.double()
    wide = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return wide.to(x.dtype)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, doubled: torch.Tensor | None = None
) -> torch.Tensor:
    """Norm x (..., hidden) by weight (hidden); x is not changed.

    doubled: what doubled_weight made of the weight, for few rows.
    """
    if doubled is not None and x.shape[0] <= FEW_ROWS:
        return _rms_norm_by_layer_norm(x, doubled, eps)
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    if weight.dtype != x.dtype:
        return (wide * scale).mul_(weight).to(x.dtype)
    return (wide * scale).to(x.dtype).mul_(weight)


def doubled_weight(weight: torch.Tensor) -> torch.Tensor:
    """A weight (hidden) as rms_norm takes it on a CPU: (2, hidden)."""
    return torch.stack((weight, weight))


def _rms_norm_by_layer_norm(x: torch.Tensor, doubled: torch.Tensor, eps: float) -> torch.Tensor:
    """The norm in 2 operations in place of 7, rounded once.

    The mean of (x, -x) is 0, so its variance, which layer_norm divides by, is the mean square of x.
    """
    both = x.unsqueeze(-2) * _signs(x.dtype, x.device)
    return F.layer_norm(both, both.shape[-2:], doubled, eps=eps).select(-2, 0)


@functools.cache
def _signs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor([[1.0], [-1.0]], dtype=dtype, device=device)


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle of add_rms_norm: (norm, sum), nothing changed in place."""
    total = (x.double() + residual.double()).to(x.dtype)
    return rms_norm_reference(total, weight, eps), total


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    doubled: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add x (T, hidden) to `residual` (T, hidden) in place and return the norm of the sum; see rms_norm."""
    return rms_norm(residual.add_(x), weight, eps, doubled)
