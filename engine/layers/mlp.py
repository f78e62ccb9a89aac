"""The feed-forward part of a layer."""

from typing import Literal

import torch
from torch import nn

from halimede.engine.layers.linear import Linear, MergedLinear
from halimede.kernels.activation import gelu_tanh_and_mul, silu_and_mul

Activation = Literal["silu", "gelu_tanh"]


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), gate and up as one matrix product."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, bias: bool, activation: Activation = "silu"
    ) -> None:
        super().__init__()
        self.activation = {"silu": silu_and_mul, "gelu_tanh": gelu_tanh_and_mul}[activation]
        self.gate_up_proj = MergedLinear(hidden_size, (intermediate_size, intermediate_size), bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(T, hidden) -> (T, hidden)."""
        down: torch.Tensor = self.down_proj(self.activation(self.gate_up_proj(hidden_states)))
        return down
