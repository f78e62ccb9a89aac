"""Writes a step's keys and values to their slots of the paged cache.

Layouts: k, v (T, K, D); caches (N, K, B, D) contiguous; slot_mapping (T), slot = block * B + offset.
Moves 2 * T * K * D elements in and out.
"""

import torch


def write_kv_reference(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """The oracle of write_kv: one token at a time."""
    block_size = k_cache.shape[2]
    for token, slot in enumerate(slot_mapping.tolist()):
        k_cache[slot // block_size, :, slot % block_size] = k[token]
        v_cache[slot // block_size, :, slot % block_size] = v[token]


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Put k, v (T, K, D) of each token at its slot (T, int64) of the caches, in place. Slots are distinct."""
    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    assert k.shape == v.shape == (slot_mapping.shape[0], num_kv_heads, head_dim), "k, v must be (T, K, D)"
    rows = cache_rows(slot_mapping[:, None], num_kv_heads, block_size).flatten()
    k_cache.view(-1, head_dim)[rows] = k.reshape(-1, head_dim)
    v_cache.view(-1, head_dim)[rows] = v.reshape(-1, head_dim)


def cache_rows(slots: torch.Tensor, num_kv_heads: int, block_size: int) -> torch.Tensor:
    """Row of each slot and kv head in a cache seen as (N * K * B, D): slots (..., S) -> (..., K, S).

    Slots (T, 1) give (T, K, 1): token-major, as k and v are laid out.
    """
    heads = torch.arange(num_kv_heads, device=slots.device)[:, None]
    blocks = slots // block_size
    return (blocks * (num_kv_heads - 1) * block_size + slots).unsqueeze(-2) + heads * block_size
