"""Projections y = x W^T + b; a weight is [N_out, K_in], as checkpoints store it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from halimede.engine.quant.forms.base import Activations, WeightForm
from halimede.kernels.matmul import matmul, pack_weight
from halimede.kernels.matmul_bags import bag_product, table_of


def empty_parameter(*shape: int) -> nn.Parameter:
    """A parameter that the loader fills: never trained, and uninitialised until then."""
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


class Linear(nn.Module):
    """One projection. Call `prepare` once its weight is loaded.

    On a CPU the weight may come to lie in other forms: packed for any number of rows, table for one. The
    plain weight is empty once nothing reads it. A quantized weight is a form of its own: `form`.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.out_features = out_features
        self.weight = empty_parameter(out_features, in_features)
        self.form: WeightForm | None = None
        self.bias = empty_parameter(out_features) if bias else None
        self.packed: torch.Tensor | None
        self.table: torch.Tensor | None
        self.register_buffer("packed", None, persistent=False)
        self.register_buffer("table", None, persistent=False)

    def prepare(self, dtype: torch.dtype, *, twice: bool = True, shared: bool = False) -> None:
        """Give the bias to the form that adds it. On a CPU: lay a plain weight out as it is multiplied
        fastest with activations of `dtype`.

        twice: 16-bit weights may be kept in two forms, one for a single row and one for more. Otherwise only
        in the one that is right for both. shared: others read the weight too, so it must stay as it is.
        """
        if self.form is None and self.weight.device.type != "cpu":
            return
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)
        if self.form is not None:
            if self.bias is not None and self.form.take_bias(self.bias):
                self.bias = None
            return
        widened = self.weight.dtype != dtype
        if not twice and widened:
            return
        self.packed = pack_weight(self.weight, dtype)
        if self.packed is None:
            return
        if widened:
            self._make_table(shared)
        if self.table is not None or self.weight.dtype == torch.float32 or not twice:
            self.weight = empty_parameter(0)

    def take_form(self, form: WeightForm) -> None:
        """Multiply with a quantized weight in place of the plain one."""
        self.form = form
        self.weight = empty_parameter(0)

    def _make_table(self, shared: bool) -> None:
        table = table_of(self.weight)
        if table is not None and not shared:
            # The weight's memory has large pages, and will not be needed twice.
            table = self.weight.detach().view(-1).copy_(table.view(-1)).view(table.shape)
        self.table = table

    def forward(self, x: Activations) -> torch.Tensor:
        """(..., K_in) -> (..., N_out). x is quantized only if that is as the form says."""
        if self.form is not None:
            y: torch.Tensor = self.form(x)
            return y if self.bias is None else y.add_(self.bias)
        assert isinstance(x, torch.Tensor), "a plain weight takes activations as they are"
        if x.device.type == "meta":  # for this torch would import sympy, which takes 0.6 s
            return x.new_empty(*x.shape[:-1], self.out_features)
        if x.device.type != "cpu":
            return F.linear(x, self.weight, self.bias)
        if self.table is not None and x.shape[0] == 1:
            y = bag_product(x, self.table)
            return y if self.bias is None else y.add_(self.bias)
        return matmul(x, self.packed, self.weight if self.weight.shape[0] else None, self.bias)


class MergedLinear(Linear):
    """Several projections of the same input as one matrix product.

    output_sizes: rows of each part, in order; the loader fills each from its own checkpoint tensor.
    """

    def __init__(self, in_features: int, output_sizes: Sequence[int], *, bias: bool) -> None:
        super().__init__(in_features, sum(output_sizes), bias=bias)
        self.output_sizes = tuple(output_sizes)
