"""The token embedding: rows of a table [V, hidden], times a scale."""

import torch
import torch.nn.functional as F


def embed(token_ids: torch.Tensor, weight: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Rows (T, hidden) of `weight` in `dtype` for token_ids (T) int64, multiplied by `scale`.

    The scale is rounded to the weight's dtype first (as Hugging Face's Gemma does: trained with sqrt(3072) =
    55.5 in bfloat16, not 55.43).
    """
    return scale_vectors(F.embedding(token_ids, weight).to(dtype), scale, weight.dtype)


def scale_vectors(vectors: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """The vectors times the scale as a weight of `dtype` has it, in place."""
    if scale == 1.0:
        return vectors
    return vectors.mul_(torch.tensor(scale, dtype=dtype, device="cpu").item())
