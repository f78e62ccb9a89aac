"""write_kv puts each token where its slot says and nothing anywhere else."""

import pytest
import torch

from halimede.kernels.kv_cache import cache_rows, write_kv, write_kv_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "kv_heads", "block_size", "head_dim"),
    [(1, 1, 16, 8), (7, 3, 16, 64), (33, 2, 32, 5), (80, 8, 16, 16), (0, 2, 16, 8)],
)
def test_write_kv(tokens: int, kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    num_blocks = 2 + tokens // block_size * 2
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:tokens]
    # q, k and v are slices of one projection, so k and v have gaps between their tokens.
    qkv = torch.randn(tokens, 4 * kv_heads, head_dim, generator=generator).to(dtype)
    k, v = qkv[:, 2 * kv_heads : 3 * kv_heads], qkv[:, 3 * kv_heads :]
    caches = [torch.full((num_blocks, kv_heads, block_size, head_dim), 7.0, dtype=dtype) for _ in range(4)]
    write_kv(k, v, caches[0], caches[1], cache_rows(slots[:, None], kv_heads, block_size).flatten())
    write_kv_reference(k, v, caches[2], caches[3], slots)
    assert torch.equal(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])
    assert int((caches[0] != 7).any(-1).sum()) == tokens * kv_heads


def test_cache_rows_name_the_memory_of_a_slot() -> None:
    cache = torch.arange(3 * 2 * 16 * 4).view(3, 2, 16, 4)
    slots = torch.tensor([0, 15, 16, 37])
    rows = cache.view(-1, 4)[cache_rows(slots, 2, 16)]
    assert torch.equal(rows, cache[slots // 16, :, slots % 16].transpose(0, 1))


def test_write_kv_refuses_wrong_shapes() -> None:
    cache = torch.zeros(2, 2, 16, 8)
    with pytest.raises(AssertionError, match="must be"):
        write_kv(torch.zeros(3, 1, 8), torch.zeros(3, 1, 8), cache, cache, torch.arange(3))
