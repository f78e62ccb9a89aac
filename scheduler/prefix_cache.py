"""Which blocks hold which prefix: an exact map, so that a hash collision cannot give wrong content.

A full block's keys and values depend on its own tokens and on all tokens before them. The key of a block is
therefore (identity of the block before it, its token ids): a chain that names the whole prefix in constant
space. The identity is a number given once and never again, not a hash, and the map compares whole keys;
two prefixes are equal here if and only if all their tokens and their salts are.
"""

from collections.abc import Iterable

Parent = int | str | None
"""What comes before a block: the prefix_id of the previous one, or the cache_salt before the first."""

PrefixKey = tuple[Parent, tuple[int, ...]]
"""What a block holds: its parent and its token ids."""


class CachedPrefix:
    """A prefix that some block holds the end of. block_ids: those blocks, usually one."""

    __slots__ = ("block_ids", "key", "prefix_id")

    def __init__(self, prefix_id: int, key: PrefixKey) -> None:
        self.prefix_id = prefix_id
        self.key = key
        self.block_ids: list[int] = []


class PrefixCache:
    """Full blocks by the prefix they end."""

    __slots__ = ("_by_block", "_by_key", "_next_id")

    def __init__(self) -> None:
        self._by_key: dict[PrefixKey, CachedPrefix] = {}
        self._by_block: dict[int, CachedPrefix] = {}
        self._next_id = 0

    def __len__(self) -> int:
        return len(self._by_block)

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._by_block

    def find(self, parent: Parent, token_ids: tuple[int, ...]) -> CachedPrefix | None:
        """The prefix made of `parent` and these tokens, None when no block holds it."""
        return self._by_key.get((parent, token_ids))

    def register(self, block_id: int, parent: Parent, token_ids: tuple[int, ...]) -> CachedPrefix:
        """Say that a block holds this prefix; other blocks may hold the same."""
        key = (parent, token_ids)
        new = CachedPrefix(self._next_id, key)
        prefix = self._by_key.setdefault(key, new)  # hashes the key once
        if prefix is new:
            self._next_id += 1
        prefix.block_ids.append(block_id)
        self._by_block[block_id] = prefix
        return prefix

    def get(self, block_id: int) -> CachedPrefix | None:
        """The prefix that a block holds the end of, None when it is not registered."""
        return self._by_block.get(block_id)

    def forget(self, block_ids: Iterable[int]) -> None:
        """Drop what is known of these blocks, if anything is."""
        for block_id in block_ids:
            prefix = self._by_block.pop(block_id, None)
            if prefix is None:
                continue
            prefix.block_ids.remove(block_id)
            if not prefix.block_ids:
                del self._by_key[prefix.key]

    def clear(self) -> None:
        """Forget every block. Identities go on, so that old ones cannot be taken for new ones."""
        self._by_key.clear()
        self._by_block.clear()

    def check_integrity(self) -> None:
        """Raise AssertionError unless the two maps say the same."""
        num_blocks = 0
        for key, prefix in self._by_key.items():
            num_blocks += len(prefix.block_ids)
            assert prefix.key == key, f"key of prefix {prefix.prefix_id} == its place in the map: {key}"
            assert prefix.block_ids, f"blocks of prefix {prefix.prefix_id} > 0"
            for block_id in prefix.block_ids:
                assert self._by_block.get(block_id) is prefix, (
                    f"prefix of block {block_id} == {prefix.prefix_id}, which lists that block"
                )
        assert num_blocks == len(self._by_block), (
            f"blocks listed by prefixes == registered blocks: {num_blocks} != {len(self._by_block)}"
        )
