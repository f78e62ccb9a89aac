"""The token embedding."""

import torch
import torch.nn.functional as F
from torch import nn

from halimede.engine.layers.linear import empty_parameter


class Embedding(nn.Module):
    """A table of one vector per token of the vocabulary; weight [V, hidden]."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = empty_parameter(vocab_size, hidden_size)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(T) int64 -> (T, hidden)."""
        return F.embedding(input_ids, self.weight)
