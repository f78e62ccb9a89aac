"""Projections y = x W^T + b; a weight is [N_out, K_in], as checkpoints store it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from halimede.kernels.matmul import matmul, pack_weight


def empty_parameter(*shape: int) -> nn.Parameter:
    """A parameter that the loader fills: never trained, and uninitialised until then."""
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


class Linear(nn.Module):
    """One projection. Call `prepare` once its weight is loaded."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = empty_parameter(out_features, in_features)
        self.bias = empty_parameter(out_features) if bias else None
        self.packed: torch.Tensor | None
        self.register_buffer("packed", None, persistent=False)

    def prepare(self) -> None:
        """On a CPU: lay the weight out as it is multiplied fastest; the plain one goes if unused."""
        if self.weight.device.type != "cpu":
            return
        self.packed = pack_weight(self.weight)
        if self.packed is not None and self.weight.dtype == torch.float32:
            self.weight = empty_parameter(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K_in) -> (..., N_out)."""
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        plain = self.weight if self.weight.shape[0] else None
        return matmul(x, self.packed, plain, self.bias)


class MergedLinear(Linear):
    """Several projections of the same input as one matrix product.

    output_sizes: rows of each part, in order; the loader fills each from its own checkpoint tensor.
    """

    def __init__(self, in_features: int, output_sizes: Sequence[int], *, bias: bool) -> None:
        super().__init__(in_features, sum(output_sizes), bias=bias)
        self.output_sizes = tuple(output_sizes)
