"""What attention must know of a step, worked out once for all layers that share a sliding window.

Row r (a sequence) has seq_lens[r] tokens in the cache; its last query_start_loc[r + 1] - query_start_loc[r]
are the step's query tokens. Rows with one query token (decode) are batched; the others (prefill) go one by
one, their queries in tiles, so that no score matrix grows with the square of a prompt.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from halimede.kernels.kv_cache import cache_rows

# Elements of k (and as many of v) that a decode batch gathers: 128 MiB of float32. A step that needs more is
# split, longest rows first, which also keeps short rows from being padded to the longest.
_MAX_BATCH_ELEMENTS = 1 << 25
# Elements of k in padding that cost as much as another batch: on two cores a batch takes 60 us of operations
# in each layer, a padding token of 192 elements 0.12 us.
_BATCH_OVERHEAD = 100_000
# Scores of one head in one prefill tile.
_MAX_TILE_SCORES = 1 << 22


@dataclass(frozen=True, slots=True)
class HeadBags:
    """The values that each query head sums up, as embedding_bag takes them.

    rows (G * H * S): a batch's cache_rows, repeated for the query heads that share a kv head. starts (G * H):
    where each head's begin. Both of one integer type.
    """

    rows: torch.Tensor
    starts: torch.Tensor


@dataclass(frozen=True, slots=True)
class DecodeScratch:
    """Memory for what decoding gathers, as large as the largest batch needs: (G * K * S, D) each.

    k, v: of the cache's dtype. wide_k, wide_v: in float32, empty where the cache is. Kept for the step: on a
    CPU fresh memory in every layer costs several times the gather itself.
    """

    k: torch.Tensor
    v: torch.Tensor
    wide_k: torch.Tensor
    wide_v: torch.Tensor


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """G rows with one query token each, their contexts padded to the longest, S.

    tokens (G) int64: the query tokens; None when they are the whole step in its order.
    cache_rows (G * K * S) int64: where their keys and values lie in a cache seen as (N * K * B, D); padding
    repeats the row's last token. mask (G, 1, 1, S): added to the scores, -inf on padding; None where a step
    has one row only.
    bags: on a CPU, beside a mask; see HeadBags.
    """

    tokens: torch.Tensor | None
    cache_rows: torch.Tensor
    mask: torch.Tensor | None
    bags: HeadBags | None


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """Query tokens start .. stop - 1 of the step against keys first_key .. last_key - 1 of their context.

    mask (queries, keys) bool, True where a query sees a key; None when queries and keys are the same tokens
    and plain causal masking is right.
    """

    start: int
    stop: int
    first_key: int
    last_key: int
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """One row with several query tokens; cache_rows (K * S) int64: the context that they can see."""

    cache_rows: torch.Tensor
    tiles: tuple[PrefillTile, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """A step as paged_attention runs it."""

    decode: tuple[DecodeBatch, ...]
    prefill: tuple[PrefillRow, ...]
    scratch: DecodeScratch


@dataclass(frozen=True, slots=True)
class _Row:
    """A row in host integers: its query tokens start .. start + count - 1 see the last `context` tokens."""

    index: int
    start: int
    count: int
    seq_len: int
    context: int


def plan_attention(
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    num_heads: int,
    k_cache: torch.Tensor,
    sliding_window: int | None = None,
) -> AttentionPlan:
    """Plan a step: block_tables (R, max_blocks), query_start_loc (R + 1), seq_lens (R), all integers.

    k_cache (N, K, B, D): one layer's, for its shape, dtype and device. sliding_window: tokens that a token
    sees, itself included; None is all. Reads the lengths back to the host (one synchronisation on a GPU).
    """
    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    rows = _read_rows(query_start_loc.tolist(), seq_lens.tolist(), sliding_window)

    def rows_of(tables: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        blocks = tables.long().gather(1, positions // block_size)
        return cache_rows(blocks * block_size + positions % block_size, num_kv_heads, block_size).flatten()

    on_cpu = k_cache.device.type == "cpu"
    decode = []
    for batch in _split_decode([row for row in rows if row.count == 1], num_kv_heads * head_dim):
        numbers = [(row.start, row.index, row.seq_len, row.context) for row in batch]
        tokens, index, seq_len, context = torch.tensor(numbers, device=k_cache.device).T
        longest = max(row.context for row in batch)
        steps = torch.arange(longest, device=k_cache.device)
        positions = torch.minimum((seq_len - context)[:, None] + steps, (seq_len - 1)[:, None])
        found = rows_of(block_tables[index], positions)
        mask = bags = None
        if len(rows) > 1:
            mask = torch.zeros(
                positions.shape, dtype=torch.float32 if on_cpu else k_cache.dtype, device=k_cache.device
            )
            mask = mask.masked_fill_(steps >= context[:, None], float("-inf"))[:, None, None]
            bags = _head_bags(found, longest, num_heads // num_kv_heads, k_cache) if on_cpu else None
        whole = len(batch) == len(rows)
        decode.append(DecodeBatch(None if whole else tokens, found, mask, bags))
    prefill = []
    for row in (row for row in rows if row.count > 1):
        positions = torch.arange(row.seq_len - row.context, row.seq_len, device=k_cache.device)[None]
        table = block_tables[row.index][None]
        tiles = tuple(_split_prefill(row, sliding_window, k_cache.device))
        prefill.append(PrefillRow(rows_of(table, positions), tiles))
    return AttentionPlan(tuple(decode), tuple(prefill), _scratch(decode, k_cache))


def _head_bags(cache_rows: torch.Tensor, length: int, group: int, k_cache: torch.Tensor) -> HeadBags:
    """HeadBags of a batch whose rows see `length` tokens each, for `group` query heads per kv head."""
    fits = k_cache.numel() // k_cache.shape[-1] < 1 << 31 and cache_rows.numel() * group < 1 << 31
    dtype = torch.int32 if fits else torch.int64
    rows = cache_rows.to(dtype).view(-1, 1, length).expand(-1, group, -1).flatten()
    return HeadBags(rows, torch.arange(0, rows.shape[0], length, dtype=dtype, device=rows.device))


def _scratch(decode: list[DecodeBatch], k_cache: torch.Tensor) -> DecodeScratch:
    """Values are gathered, and widened, for batches without bags only."""
    keys = max((batch.cache_rows.shape[0] for batch in decode), default=0)
    values = max((batch.cache_rows.shape[0] for batch in decode if batch.bags is None), default=0)
    widens = k_cache.dtype != torch.float32

    def empty(rows: int, dtype: torch.dtype) -> torch.Tensor:
        return k_cache.new_empty(rows, k_cache.shape[-1], dtype=dtype)

    return DecodeScratch(
        k=empty(keys, k_cache.dtype),
        v=empty(values, k_cache.dtype),
        wide_k=empty(keys if widens else 0, torch.float32),
        wide_v=empty(values if widens else 0, torch.float32),
    )


def _read_rows(starts: list[int], seq_lens: list[int], window: int | None) -> list[_Row]:
    """The rows that have query tokens."""
    rows = []
    for index, (start, stop, seq_len) in enumerate(zip(starts[:-1], starts[1:], seq_lens, strict=True)):
        count = stop - start
        assert 0 <= count <= seq_len, f"row {index} runs {count} tokens but is only {seq_len} long"
        context = seq_len if window is None else min(seq_len, window + count - 1)
        if count:
            rows.append(_Row(index, start, count, seq_len, context))
    return rows


def _split_decode(rows: list[_Row], elements_per_token: int) -> Iterator[list[_Row]]:
    """Batches of rows in the step's order, each within _MAX_BATCH_ELEMENTS (or one row alone)."""
    ordered = sorted(rows, key=lambda row: -row.context)
    contexts = np.array([row.context for row in ordered])
    first = 0
    while first < len(ordered):
        count = max(1, _MAX_BATCH_ELEMENTS // int(contexts[first] * elements_per_token))
        last = _end_of_batch(contexts, first, min(first + count, len(ordered)), elements_per_token)
        yield sorted(ordered[first:last], key=lambda row: row.index)
        first = last


def _end_of_batch(contexts: npt.NDArray[np.int64], first: int, last: int, elements_per_token: int) -> int:
    """Where a batch that begins at row `first` ends, at most `last`; contexts descend.

    It is cut where that saves most padding, again and again while a cut saves more than another batch costs.
    """
    while True:
        part = contexts[first:last]
        saved = (part[0] - part) * np.arange(len(part), 0, -1) * elements_per_token
        cut = int(saved.argmax())
        if saved[cut] <= _BATCH_OVERHEAD:
            return last
        last = first + cut


def _split_prefill(row: _Row, window: int | None, device: torch.device) -> Iterator[PrefillTile]:
    """Tiles of queries, each with the keys that at least one of its queries sees."""
    size = max(1, _MAX_TILE_SCORES // row.context)
    origin, first_query = row.seq_len - row.context, row.seq_len - row.count
    for begin in range(0, row.count, size):
        end = min(begin + size, row.count)
        query, stop = first_query + begin, first_query + end
        key = 0 if window is None else max(0, query - window + 1)
        mask = None
        if key != query or (window is not None and end - begin > window):
            queries = torch.arange(query, stop, device=device)[:, None]
            keys = torch.arange(key, stop, device=device)
            mask = keys <= queries
            if window is not None:
                mask &= keys > queries - window
        yield PrefillTile(row.start + begin, row.start + end, key - origin, stop - origin, mask)
