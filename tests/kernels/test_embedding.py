"""The embedding kernel against the torch path, and what it refuses."""

import pytest
import torch

from halimede.errors import KernelError
from halimede.kernels import embedding
from halimede.kernels.gpu.embedding import embed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 3072**0.5])
def test_it_gives_what_torch_gives(scale: float, dtype: torch.dtype) -> None:
    weight, ids = torch.randn(50, 40).bfloat16(), torch.randint(50, (7,))
    assert torch.equal(embed(ids, weight, scale, dtype), embedding.embed(ids, weight, scale, dtype))


def test_what_does_not_fit_is_refused() -> None:
    weight, ids = torch.zeros(5, 8), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(KernelError, match="contiguous ids"):
        embed(ids.int(), weight)
    with pytest.raises(KernelError, match="contiguous weight"):
        embed(ids, weight.T)
    with pytest.raises(KernelError, match="to become"):
        embed(ids, weight, dtype=torch.int8)
