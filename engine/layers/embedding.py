"""The token embedding."""

import torch
from torch import nn

from halimede.engine.layers.linear import empty_parameter
from halimede.engine.quant.forms.base import WeightForm
from halimede.kernels.embedding import scale_vectors
from halimede.kernels.ops import TORCH, Ops


class Embedding(nn.Module):
    """A table of one vector per token of the vocabulary; weight [V, hidden].

    scale: what the vectors are multiplied by, see kernels/embedding.py. The weight itself may be tied to the
    projection to the vocabulary, which is not scaled.
    """

    def __init__(self, vocab_size: int, hidden_size: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = empty_parameter(vocab_size, hidden_size)
        self.form: WeightForm | None = None
        self.scale = scale
        self.ops = TORCH
        self._dtype: torch.dtype | None = None

    def prepare(self, dtype: torch.dtype, ops: Ops) -> None:
        """Give out vectors of `dtype`; the weight stays as it is."""
        self._dtype, self.ops = dtype, ops

    def take_form(self, form: WeightForm) -> None:
        """Give out rows of a quantized weight in place of the plain one."""
        self.form = form
        self.weight = empty_parameter(0)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(T) int64 -> (T, hidden)."""
        if self.form is not None:
            vectors = self.form.rows(input_ids).to(self.form.dtype)
            return scale_vectors(vectors.to(self._dtype or vectors.dtype), self.scale, self.form.dtype)
        return self.ops.embed(input_ids, self.weight, self.scale, self._dtype or self.weight.dtype)
