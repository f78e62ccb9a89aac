"""xformers' memory-efficient attention over our paged cache, to compare with our kernels on the spot.

Rows of one token with blocks of 64 and more read the cache where it lies: a block of one kv head is
contiguous, which makes it a page of xformers' split-K kernel once each (row, kv head) is a sequence of its
own. All other steps gather keys and values first. Lengths are read back to the host, to make xformers' masks.
"""

from itertools import pairwise

import torch

from halimede.engine.layers.attention_gpu import Attend, PagedRows
from halimede.engine.model_input import KVCache
from halimede.kernels.kv_cache import cache_rows

# Triton code of xformers reads tiles of so many keys, which must not cross a page.
_TILE = 64


class XformersAttention:
    """Attention by xformers' kernels. ImportError where xformers is not installed."""

    def __init__(self) -> None:
        from xformers.ops import fmha

        self._fmha = fmha

    def prepare(self, rows: PagedRows, kv_cache: KVCache, num_heads: int, window: int | None) -> Attend:
        """As PagedAttention.prepare."""
        starts, lengths = rows.query_start_loc.tolist(), rows.seq_lens.tolist()
        counts = [stop - start for start, stop in pairwise(starts)]
        used = [row for row, count in enumerate(counts) if count]
        if not used:
            return lambda q, kv_cache, scale: torch.empty_like(q)
        queries, keys = [counts[row] for row in used], [lengths[row] for row in used]
        tables = rows.block_tables[used]
        block_size = kv_cache.k.shape[2]
        if window is None and block_size % _TILE == 0 and all(count == 1 for count in queries):
            return self._paged(tables, keys, kv_cache)
        return self._gathered(tables, queries, keys, kv_cache, window)

    def _paged(self, tables: torch.Tensor, keys: list[int], kv_cache: KVCache) -> Attend:
        num_blocks, num_kv_heads, block_size, head_dim = kv_cache.k.shape
        heads = torch.arange(num_kv_heads, dtype=torch.int32, device=tables.device)
        pages = (tables[:, None] * num_kv_heads + heads[:, None]).flatten(0, 1)
        lengths = [length for length in keys for _ in range(num_kv_heads)]
        bias = self._fmha.attn_bias.PagedBlockDiagonalPaddedKeysMask.from_seqlens(
            q_seqlen=[1] * len(lengths),
            kv_seqlen=lengths,
            block_tables=pages,
            page_size=block_size,
            device=tables.device,
        )

        def attend(q: torch.Tensor, kv_cache: KVCache, scale: float) -> torch.Tensor:
            group = q.shape[1] // num_kv_heads
            query = q.reshape(1, -1, 1, group, head_dim)
            shape = (1, num_blocks * num_kv_heads * block_size, 1, group, head_dim)
            k, v = (cache.view(1, -1, 1, 1, head_dim).expand(shape) for cache in kv_cache[:2])
            output: torch.Tensor = self._fmha.memory_efficient_attention_forward(
                query, k, v, bias, scale=scale, op=self._fmha.triton_splitk.FwOp
            )
            return output.reshape(q.shape)

        return attend

    def _gathered(
        self,
        tables: torch.Tensor,
        queries: list[int],
        keys: list[int],
        kv_cache: KVCache,
        window: int | None,
    ) -> Attend:
        _, num_kv_heads, block_size, head_dim = kv_cache.k.shape
        slots = [_slots(table, length, block_size) for table, length in zip(tables, keys, strict=True)]
        found = torch.cat(slots)
        places = cache_rows(found[:, None], num_kv_heads, block_size).flatten()  # token after token
        bias = self._fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(
            queries, keys, device=tables.device
        )
        if window is not None:
            bias = bias.make_local_attention_from_bottomright(window)

        def attend(q: torch.Tensor, kv_cache: KVCache, scale: float) -> torch.Tensor:
            group = q.shape[1] // num_kv_heads
            shape = (1, found.shape[0], num_kv_heads, group, head_dim)
            k, v = (
                cache.view(-1, head_dim)[places].view(1, -1, num_kv_heads, 1, head_dim).expand(shape)
                for cache in kv_cache[:2]
            )
            output: torch.Tensor = self._fmha.memory_efficient_attention_forward(
                q.reshape(1, -1, num_kv_heads, group, head_dim), k, v, bias, scale=scale
            )
            return output.reshape(q.shape)

        return attend


def _slots(table: torch.Tensor, length: int, block_size: int) -> torch.Tensor:
    """The slots (length) int64 of a row's tokens in order."""
    positions = torch.arange(length, device=table.device)
    return table[positions // block_size].long() * block_size + positions % block_size
