"""The feed-forward part of a layer."""

from typing import Literal

import torch
from torch import nn

from halimede.engine.layers.linear import Linear, MergedLinear
from halimede.kernels.ops import TORCH, Ops

Activation = Literal["silu", "gelu_tanh"]


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), gate and up as one matrix product."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, bias: bool, activation: Activation = "silu"
    ) -> None:
        super().__init__()
        self._name = activation
        self.prepare(TORCH)
        self.gate_up_proj = MergedLinear(hidden_size, (intermediate_size, intermediate_size), bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def prepare(self, ops: Ops) -> None:
        """Take the activation from `ops`."""
        self.activation = {"silu": ops.silu_and_mul, "gelu_tanh": ops.gelu_tanh_and_mul}[self._name]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(T, hidden) -> (T, hidden)."""
        down: torch.Tensor = self.down_proj(self.activation(self.gate_up_proj(hidden_states)))
        return down
