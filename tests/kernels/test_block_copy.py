"""Copying KV blocks: what is refused."""

import pytest
import torch

from halimede.errors import KernelError
from halimede.kernels.gpu.block_copy import copy_blocks


def test_what_does_not_fit_is_refused() -> None:
    pairs, cache, scale = (
        torch.zeros(1, 2, dtype=torch.int64),
        torch.zeros(4, 2, 16, 8),
        torch.zeros(4, 2, 16),
    )
    with pytest.raises(KernelError, match=r"pairs \(P, 2\) int64"):
        copy_blocks(pairs.int(), cache, cache)
    with pytest.raises(KernelError, match=r"pairs \(P, 2\) int64"):
        copy_blocks(pairs[0], cache, cache)
    with pytest.raises(KernelError, match="contiguous and alike"):
        copy_blocks(pairs, cache, cache.half())
    with pytest.raises(KernelError, match="contiguous and alike"):
        copy_blocks(pairs, cache.mT, cache.mT)
    with pytest.raises(KernelError, match="both scales or neither"):
        copy_blocks(pairs, cache, cache, scale)
    with pytest.raises(KernelError, match="of every token and head"):
        copy_blocks(pairs, cache, cache, scale[0], scale[0])
