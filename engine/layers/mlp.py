"""The feed-forward part of a layer."""

import torch
from torch import nn

from halimede.engine.layers.linear import Linear, MergedLinear
from halimede.kernels.activation import silu_and_mul


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up as one matrix product."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_up_proj = MergedLinear(hidden_size, (intermediate_size, intermediate_size), bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(T, hidden) -> (T, hidden)."""
        down: torch.Tensor = self.down_proj(silu_and_mul(self.gate_up_proj(hidden_states)))
        return down
