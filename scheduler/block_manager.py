"""Block tables: gives sequences their KV cache blocks and shares those that hold an equal prefix."""

from collections.abc import Iterable

from halimede.scheduler.block_pool import PADDING_BLOCK, BlockPool
from halimede.scheduler.prefix_cache import CachedPrefix, PrefixCache
from halimede.scheduler.sequence import NEVER, Sequence

Hit = tuple[int, CachedPrefix]
"""A block that holds the next block's worth of a sequence's prefix."""


class BlockManager:
    """Owns the blocks. Tables only grow until they are freed whole.

    A full block of a prompt is registered in the prefix cache when the step that fills it is scheduled: every
    layer writes all keys and values of a step before it reads any, so a sequence of the same step may read
    it. One with sampled tokens is registered when its last token is known and a step that runs it scheduled.

    Who may write to a block, and when it is given back: see Scheduler.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool) -> None:
        self._pool = BlockPool(num_blocks)
        self._cache = PrefixCache()
        self._block_size = block_size
        self._caching = enable_prefix_caching
        self._registrations: list[Hit] = []

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds, those with cached content included."""
        return self._pool.num_free

    @property
    def usage(self) -> float:
        """Share of the blocks that sequences hold, in [0, 1]."""
        return 1.0 - self._pool.num_free / (self._pool.num_blocks - 1)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks, held or free, that the prefix cache knows."""
        return len(self._cache)

    def match_prefix(self, sequence: Sequence) -> list[Hit]:
        """Cached blocks for the longest known prefix that leaves at least one token to compute."""
        hits: list[Hit] = []
        if not self._caching or not sequence.request.sampling_params.reads_prefix_cache:
            return hits
        token_ids, size = sequence.token_ids, self._block_size
        ref_counts = self._pool.ref_counts
        parent = sequence.parent
        for start in range(0, (len(token_ids) - 1) // size * size, size):
            prefix = self._cache.find(parent, tuple(token_ids[start : start + size]))
            if prefix is None:
                break
            # A block in use costs no free one; the first is as good as any otherwise.
            block_id = max(prefix.block_ids, key=ref_counts.__getitem__)
            hits.append((block_id, prefix))
            parent = prefix.prefix_id
        return hits

    def num_blocks_wanted(self, sequence: Sequence, hits: list[Hit]) -> int:
        """Free blocks that `allocate` takes out of the queue, the free ones among the hits included."""
        ref_counts = self._pool.ref_counts
        num_in_use = sum(1 for block_id, _ in hits if ref_counts[block_id])
        return -(-len(sequence.token_ids) // self._block_size) - num_in_use

    def allocate(self, sequence: Sequence, hits: list[Hit]) -> None:
        """Give a sequence without blocks the hits, and new blocks for the rest of its known tokens.

        All known tokens at once, however few of them the step runs: a sequence that was started can then
        not be stopped half-way through its prompt by another one that starts.
        """
        assert not sequence.block_table, f"sequence {sequence.seq_id} has blocks already"
        for block_id, _ in hits:
            self._pool.acquire(block_id)
        sequence.block_table = [block_id for block_id, _ in hits]
        if hits:
            sequence.parent = hits[-1][1].prefix_id
        sequence.num_shared_blocks = sequence.num_registered_blocks = len(hits)
        sequence.num_computed_tokens = len(hits) * self._block_size
        sequence.register_at = sequence.num_computed_tokens + self._block_size if self._caching else NEVER
        grown = self.grow(sequence, len(sequence.token_ids))
        assert grown is not None, f"sequence {sequence.seq_id} needs more blocks than are free"

    def grow(self, sequence: Sequence, num_tokens: int) -> tuple[int, ...] | None:
        """Add the blocks that a sequence needs to hold num_tokens tokens to its table, and return them.

        None, and nothing added, when fewer are free. What the blocks held is forgotten.
        """
        table, pool = sequence.block_table, self._pool
        count = -(-num_tokens // self._block_size) - len(table)
        if count > pool.num_free:
            return None
        block_ids = pool.take(count)
        self._cache.forget(block_ids)
        table += block_ids
        sequence.capacity = len(table) * self._block_size
        return block_ids

    def register_full_blocks(self, sequence: Sequence) -> None:
        """Register the blocks that known, computed tokens fill and that are not registered yet."""
        size = self._block_size
        num_tokens = min(sequence.num_computed_tokens, len(sequence.token_ids))
        while num_tokens >= sequence.register_at:
            end = sequence.register_at
            block_id = sequence.block_table[sequence.num_registered_blocks]
            token_ids = tuple(sequence.token_ids[end - size : end])
            prefix = self._cache.register(block_id, sequence.parent, token_ids)
            self._registrations.append((block_id, prefix))
            sequence.parent = prefix.prefix_id
            sequence.num_registered_blocks += 1
            sequence.register_at = end + size

    def take_registrations(self) -> list[Hit]:
        """What was registered since the last call."""
        registrations, self._registrations = self._registrations, []
        return registrations

    def drop_registrations(self, registrations: Iterable[Hit]) -> None:
        """Take registrations back, except of blocks that have been reused since."""
        for block_id, prefix in registrations:
            if self._cache.get(block_id) is prefix:
                self._cache.forget((block_id,))

    def free(self, sequence: Sequence, *, keep_cached: bool = True) -> None:
        """Give all blocks of a sequence back, tail first: a prefix is of use without its end, not without
        its start. keep_cached False makes the prefix cache forget those that the sequence filled itself.
        """
        if not keep_cached:
            self._cache.forget(sequence.block_table[sequence.num_shared_blocks :])
        for block_id in reversed(sequence.block_table):
            self._pool.release(block_id, reuse_first=block_id not in self._cache)
        sequence.forget_blocks()

    def reset_prefix_cache(self) -> None:
        """Forget all cached content. Only while no sequence holds blocks."""
        self._cache.clear()

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raise AssertionError with the equation that does not hold for the sequences that have blocks."""
        occurrences = [0] * self._pool.num_blocks
        ref_counts = self._pool.ref_counts
        for sequence in sequences:
            table = sequence.block_table
            for block_id in table:
                occurrences[block_id] += 1
            assert sequence.capacity == len(table) * self._block_size >= sequence.num_computed_tokens, (
                f"capacity == blocks * block_size >= computed tokens: {sequence.capacity}, "
                f"{len(table)} * {self._block_size}, {sequence.num_computed_tokens}"
            )
            for block_id in table[sequence.num_computed_tokens // self._block_size :]:
                assert ref_counts[block_id] == 1, (
                    f"references of writable block {block_id} == 1, not {ref_counts[block_id]}"
                )
                assert block_id not in self._cache, f"writable block {block_id} in prefix cache == False"
        self._pool.check_integrity(occurrences)
        self._cache.check_integrity()
        assert PADDING_BLOCK not in self._cache, f"block {PADDING_BLOCK} in prefix cache == False"
