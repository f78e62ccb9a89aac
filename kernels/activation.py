"""Gated activation: y = silu(gate) * up, silu(g) = g / (1 + exp(-g)).

Layouts: x (T, 2I), gate in the first I columns and up in the others; y (T, I).
"""

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
