"""The feed-forward part of a layer."""

import torch
from torch import nn

from halimede.engine.layers.linear import Linear, MergedLinear
from halimede.engine.quant.forms.base import ActivationQuant, Activations, QuantizedActivations
from halimede.kernels.ops import TORCH, Gate, Ops


def is_for_gated_matmul(weight: torch.Tensor) -> bool:
    """Whether the kernel takes a weight: it has 16 bits, and lies as it was loaded, as on all but a CPU."""
    return weight.dtype.itemsize == 2 and weight.device.type != "cpu"


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), gate and up as one matrix product."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, bias: bool, activation: Gate = "silu"
    ) -> None:
        super().__init__()
        self._name = activation
        self._is_gated = False
        self.gate_up_proj = MergedLinear(hidden_size, (intermediate_size, intermediate_size), bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)
        self.prepare(TORCH)

    def prepare(self, ops: Ops) -> None:
        """Take the activation, and what computes it with the product before it or with the rounding after it,
        from `ops` and the loaded weights.
        """
        self._gated_matmul, self._gated_rows = ops.gated_matmul, ops.gated_rows
        self.activation = {"silu": ops.silu_and_mul, "gelu_tanh": ops.gelu_tanh_and_mul}[self._name]
        self._activate_quant, down = ops.activate_quant, self.down_proj.form
        self._quant: ActivationQuant | None = None if down is None else down.quantizes
        form, bias = self.gate_up_proj.form, self.gate_up_proj.bias
        if form is not None and form.bias is None and bias is None and not self._is_gated:
            self._is_gated = form.make_gated(self._name)

    def forward(self, hidden_states: Activations) -> torch.Tensor:
        """(T, hidden) -> (T, hidden)."""
        down: torch.Tensor = self.down_proj(self._gate_and_up(hidden_states))
        return down

    def _gate_and_up(self, hidden_states: Activations) -> Activations:
        """What goes into the last product: (T, intermediate)."""
        if self._gated_matmul is not None and self.gate_up_proj.form is None:
            assert isinstance(hidden_states, torch.Tensor), "a plain weight takes activations as they are"
            weight, bias = self.gate_up_proj.weight, self.gate_up_proj.bias
            if hidden_states.shape[0] <= self._gated_rows and is_for_gated_matmul(weight):
                return self._gated_matmul(hidden_states, weight, bias, self._name)
        both: torch.Tensor = self.gate_up_proj(hidden_states)
        if self._is_gated:
            return both
        kernel, quant = self._activate_quant, self._quant
        if kernel is None or quant is None:
            return self.activation(both)
        codes, scales = kernel(both, self._name, quant.dtype, quant.group_size, quant.scale)
        return QuantizedActivations(codes, scales, both.dtype)
