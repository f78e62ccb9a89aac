"""What launchers find their variants by (launch.Variant), beside sizes: cheap to make and to hash."""

import torch

Layout = tuple[torch.dtype, torch.Size, bool]
"""Of a tensor: its dtype, its shape and whether it is contiguous."""


def layout(tensor: torch.Tensor | None) -> Layout | None:
    """The tensor's; None for None. For tensors that are the same at every launch: weights, caches, scales."""
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.is_contiguous())


def with_tokens(shape: tuple[int, ...]) -> str:
    """For messages about a tensor whose first size, the number of tokens, is no part of a key."""
    return f"({', '.join(['T', *map(str, shape)])})"
