"""The token embedding."""

import torch
import torch.nn.functional as F
from torch import nn

from halimede.engine.layers.linear import empty_parameter


class Embedding(nn.Module):
    """A table of one vector per token of the vocabulary; weight [V, hidden].

    scale: what the vectors are multiplied by, after it is rounded to their dtype (as Hugging Face's Gemma
    does: trained with sqrt(3072) = 55.5 in bfloat16, not 55.43). The weight itself may be tied to the
    projection to the vocabulary, which is not scaled.
    """

    def __init__(self, vocab_size: int, hidden_size: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = empty_parameter(vocab_size, hidden_size)
        self.scale = scale
        self._dtype: torch.dtype | None = None

    def prepare(self, dtype: torch.dtype) -> None:
        """Give out vectors of `dtype`; the weight stays as it is."""
        self._dtype = dtype

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(T) int64 -> (T, hidden)."""
        vectors = F.embedding(input_ids, self.weight)
        if self._dtype is not None:
            vectors = vectors.to(self._dtype)
        if self.scale == 1.0:
            return vectors
        return vectors.mul_(torch.tensor(self.scale, dtype=self.weight.dtype, device="cpu").item())
