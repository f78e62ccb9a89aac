"""Which KV cache blocks are free, and how many sequences hold each other one; knows nothing of contents."""

from collections import OrderedDict
from collections.abc import Sequence

PADDING_BLOCK = 0
"""Never handed out: padding rows of a batch point at it."""


class BlockPool:
    """Reference counts of num_blocks blocks, and the queue of the free ones.

    The queue is in the order of reuse. A block keeps what it holds until it is taken, so the front is
    whatever was used least recently, after blocks whose content nobody can ask for again.
    """

    __slots__ = ("_free", "num_blocks", "ref_counts")

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(PADDING_BLOCK + 1, num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._free)

    def take(self, count: int) -> tuple[int, ...]:
        """Hand out `count` blocks, each with one reference, least recently used first."""
        assert count <= len(self._free), f"take({count}) > {len(self._free)} free blocks"
        block_ids = []
        for _ in range(count):
            block_id, _ = self._free.popitem(last=False)
            self.ref_counts[block_id] = 1
            block_ids.append(block_id)
        return tuple(block_ids)

    def acquire(self, block_id: int) -> None:
        """Add a reference to a block, free or not, whose content is wanted again."""
        if self.ref_counts[block_id] == 0:
            del self._free[block_id]
        self.ref_counts[block_id] += 1

    def release(self, block_id: int, *, reuse_first: bool) -> None:
        """Drop a reference; the last one puts the block into the free queue, at the front if reuse_first."""
        self.ref_counts[block_id] -= 1
        if self.ref_counts[block_id] == 0:
            self._free[block_id] = None
            if reuse_first:
                self._free.move_to_end(block_id, last=False)

    def check_integrity(self, occurrences: Sequence[int]) -> None:
        """Raise AssertionError unless every count adds up.

        occurrences (N): how often each block occurs in the block tables.
        """
        counts, free = self.ref_counts, self._free
        if list(occurrences) != counts:
            block_id = next(b for b, count in enumerate(counts) if count != occurrences[b])
            raise AssertionError(
                f"reference counts == occurrences in block tables: block {block_id} has "
                f"{counts[block_id]} references and occurs {occurrences[block_id]} times"
            )
        num_used = sum(1 for count in counts if count)
        assert len(free) + num_used == self.num_blocks - 1, (
            f"free + used == blocks - 1: {len(free)} + {num_used} != {self.num_blocks} - 1"
        )
        both = [block_id for block_id in free if counts[block_id]]
        assert not both, f"free and referenced == empty: blocks {both}"
        assert PADDING_BLOCK not in free, f"block {PADDING_BLOCK} in free queue == False"
        assert counts[PADDING_BLOCK] == 0, f"references of block {PADDING_BLOCK} == 0"
