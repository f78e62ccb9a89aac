"""What launchers find their variants by (launch.Variant), beside sizes: cheap to make and to hash."""

import bisect

import torch

from halimede.kernels.target import Target
from halimede.kernels.tuning import tuned_table

Layout = tuple[torch.dtype, torch.Size, bool]
"""Of a tensor: its dtype, its shape and whether it is contiguous."""


def layout(tensor: torch.Tensor | None) -> Layout | None:
    """The tensor's; None for None. For tensors that are the same at every launch: weights, caches, scales."""
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.is_contiguous())


def with_tokens(shape: tuple[int, ...]) -> str:
    """For messages about a tensor whose first size, the number of tokens, is no part of a key."""
    return f"({', '.join(['T', *map(str, shape)])})"


def tuned_bucket(kernel: str, target: Target, size: int) -> int:
    """A size for which pick_config chooses as it does for `size`, whatever its key: one of a few.

    For a size that varies from step to step, of which a variant for each would be too many.
    """
    tuned = tuned_table(target.name).get(kernel)
    if not tuned:
        return 0
    buckets = sorted({bucket for entries in tuned.values() for bucket, _ in entries})
    return buckets[min(bisect.bisect_left(buckets, size), len(buckets) - 1)]
