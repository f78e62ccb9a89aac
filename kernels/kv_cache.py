"""Writes a step's keys and values to their slots of the paged cache.

Layouts: k, v (T, K, D); caches (N, K, B, D) contiguous; slot_mapping (T), slot = block * B + offset;
rows (T * K) of a cache seen as (N * K * B, D), made of the slots by `cache_rows` once per step.
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
    rows: torch.Tensor,
) -> None:
    """Put k, v (T, K, D) of each token and head at its row (T * K, int64), in place. Rows are distinct.

    They are rounded to the caches' dtype.
    """
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    assert k.shape == v.shape, "k and v must be of one shape"
    assert k.shape == (rows.shape[0] // num_kv_heads, num_kv_heads, head_dim), "k, v must be (T, K, D)"
    k_cache.view(-1, head_dim).index_copy_(0, rows, k.to(k_cache.dtype).reshape(-1, head_dim))
    v_cache.view(-1, head_dim).index_copy_(0, rows, v.to(v_cache.dtype).reshape(-1, head_dim))


def cache_rows(slots: torch.Tensor, num_kv_heads: int, block_size: int) -> torch.Tensor:
    """Row of each slot and kv head in a cache seen as (N * K * B, D): slots (..., S) -> (..., K, S).

    Slots (T, 1) give (T, K, 1): token-major, as k and v are laid out.
    """
    heads = torch.arange(num_kv_heads, device=slots.device)[:, None]
    blocks = slots // block_size
    return (blocks * (num_kv_heads - 1) * block_size + slots).unsqueeze(-2) + heads * block_size
