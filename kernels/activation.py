"""Gated activations: y = act(gate) * up.

    silu(g)      = g / (1 + exp(-g))
    gelu_tanh(g) = g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 g^3)))

Layouts: x (T, 2I), gate in the first I columns and up in the others; y (T, I).
"""

import math

import torch
import torch.nn.functional as F


def silu_and_mul_reference(x: torch.Tensor) -> torch.Tensor:
    """The oracle of silu_and_mul: float64 inside."""
    gate, up = x.double().chunk(2, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * up).to(x.dtype)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """(T, 2I) -> (T, I); x is not changed."""
    assert x.shape[-1] % 2 == 0, f"silu_and_mul needs an even last dimension, got {tuple(x.shape)}"
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_tanh_and_mul_reference(x: torch.Tensor) -> torch.Tensor:
    """The oracle of gelu_tanh_and_mul: float64 inside."""
    gate, up = x.double().chunk(2, dim=-1)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return (gate / 2 * (1 + torch.tanh(inner)) * up).to(x.dtype)


def gelu_tanh_and_mul(x: torch.Tensor) -> torch.Tensor:
    """(T, 2I) -> (T, I); x is not changed."""
    assert x.shape[-1] % 2 == 0, f"gelu_tanh_and_mul needs an even last dimension, got {tuple(x.shape)}"
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)
