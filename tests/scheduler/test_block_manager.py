from collections.abc import Sequence as Tokens

import pytest

from halimede.scheduler.block_manager import BlockManager
from halimede.scheduler.block_pool import BlockPool
from halimede.scheduler.prefix_cache import PrefixCache
from halimede.scheduler.request import Request
from halimede.scheduler.sampling_params import SamplingParams
from halimede.scheduler.sequence import Sequence


def sequence(tokens: Tokens[int], salt: str | None = None, seq_id: int = 0) -> Sequence:
    request = Request(
        f"r{seq_id}", tuple(tokens), SamplingParams(), seed=0, arrival_time=0.0, cache_salt=salt
    )
    return Sequence(seq_id, request, (0, 0.0, seq_id), max_model_len=1000)


def run(blocks: BlockManager, tokens: Tokens[int], salt: str | None = None) -> tuple[Sequence, int]:
    """Start a sequence and compute all of it; how many of its blocks came from the cache."""
    new = sequence(tokens, salt)
    hits = blocks.match_prefix(new)
    blocks.allocate(new, hits)
    new.num_computed_tokens = len(new.token_ids)
    blocks.register_full_blocks(new)
    return new, len(hits)


def manager(num_blocks: int = 16) -> BlockManager:
    return BlockManager(num_blocks, 4, enable_prefix_caching=True)


class TestBlockPool:
    def test_block_zero_is_never_handed_out(self) -> None:
        pool = BlockPool(5)
        assert pool.num_free == 4
        assert pool.take(4) == (1, 2, 3, 4)
        with pytest.raises(AssertionError, match=r"take\(1\) > 0 free blocks"):
            pool.take(1)

    def test_least_recently_released_is_reused_first(self) -> None:
        pool = BlockPool(5)
        pool.take(4)
        for block_id in (3, 1, 4):
            pool.release(block_id, reuse_first=False)
        pool.release(2, reuse_first=True)
        assert pool.take(4) == (2, 3, 1, 4)

    def test_shared_block_is_free_after_the_last_release(self) -> None:
        pool = BlockPool(3)
        (block_id,) = pool.take(1)
        pool.acquire(block_id)
        pool.release(block_id, reuse_first=False)
        assert pool.num_free == 1
        pool.release(block_id, reuse_first=False)
        assert pool.num_free == 2
        pool.acquire(block_id)
        assert pool.take(1) != (block_id,)

    def test_integrity_names_the_equation(self) -> None:
        pool = BlockPool(4)
        (block_id,) = pool.take(1)
        pool.check_integrity([0, 1, 0, 0])
        with pytest.raises(AssertionError, match="block 1 has 1 references and occurs 0 times"):
            pool.check_integrity([0, 0, 0, 0])
        pool._free[block_id] = None
        with pytest.raises(AssertionError, match=r"free \+ used == blocks - 1"):
            pool.check_integrity([0, 1, 0, 0])


class TestPrefixCache:
    def test_colliding_hashes_give_the_right_content(self) -> None:
        collision = 2**61 - 1  # the modulus of Python's integer hash
        first, second = (0, 1, 2, 3), (collision, 1, 2, 3)
        assert hash((None, first)) == hash((None, second))
        cache = PrefixCache()
        cache.register(1, None, first)
        assert cache.find(None, second) is None
        cache.register(2, None, second)
        for tokens, block_id in ((first, 1), (second, 2)):
            found = cache.find(None, tokens)
            assert found is not None
            assert found.block_ids == [block_id]

    def test_colliding_parents_give_the_right_content(self) -> None:
        cache = PrefixCache()
        cache.register(1, 0, (5,))
        assert hash((0, (5,))) == hash((2**61 - 1, (5,)))
        assert cache.find(2**61 - 1, (5,)) is None

    def test_identities_are_never_given_again(self) -> None:
        cache = PrefixCache()
        old = cache.register(1, None, (1,)).prefix_id
        cache.forget((1,))
        assert cache.register(1, None, (1,)).prefix_id != old
        cache.clear()
        assert cache.register(1, None, (1,)).prefix_id not in (old, old + 1)

    def test_one_of_two_blocks_with_the_same_content_may_go(self) -> None:
        cache = PrefixCache()
        prefix = cache.register(1, None, (1,))
        assert cache.register(2, None, (1,)) is prefix
        cache.check_integrity()
        cache.forget((1,))
        assert cache.find(None, (1,)) is prefix
        cache.forget((2,))
        assert cache.find(None, (1,)) is None
        cache.forget((2,))
        assert len(cache) == 0

    def test_integrity_names_the_equation(self) -> None:
        cache = PrefixCache()
        cache.register(1, None, (1,))
        del cache._by_block[1]
        with pytest.raises(AssertionError, match="prefix of block 1 == 0"):
            cache.check_integrity()


class TestBlockManager:
    def test_equal_prefixes_share_full_blocks(self) -> None:
        blocks = manager()
        first, _ = run(blocks, range(10))
        second, num_hits = run(blocks, [*range(9), 99])
        assert num_hits == 2
        assert second.block_table[:2] == first.block_table[:2]
        assert second.block_table[2] != first.block_table[2]
        blocks.check_integrity([first, second])

    def test_one_token_is_left_to_compute(self) -> None:
        blocks = manager()
        run(blocks, range(8))
        assert len(blocks.match_prefix(sequence(range(8)))) == 1
        assert len(blocks.match_prefix(sequence(range(9)))) == 2

    def test_same_tokens_after_another_prefix_are_not_shared(self) -> None:
        blocks = manager()
        run(blocks, [1, 2, 3, 4, 5, 6, 7, 8])
        assert blocks.match_prefix(sequence([9, 9, 9, 9, 5, 6, 7, 8, 0])) == []
        assert blocks.match_prefix(sequence([5, 6, 7, 8, 0])) == []

    def test_salts_divide(self) -> None:
        blocks = manager()
        run(blocks, range(9), salt="a")
        assert len(blocks.match_prefix(sequence(range(9), salt="a"))) == 2
        for salt in ("b", "", None):
            assert blocks.match_prefix(sequence(range(9), salt=salt)) == []

    def test_colliding_prompts_are_told_apart(self) -> None:
        blocks = manager()
        run(blocks, [0, 0, 0, 0, 0])
        assert blocks.match_prefix(sequence([2**61 - 1, 0, 0, 0, 0])) == []

    def test_content_outlives_its_sequence_until_the_block_is_reused(self) -> None:
        blocks = manager(num_blocks=5)
        first, _ = run(blocks, range(8))
        table = first.block_table
        blocks.free(first)
        assert [block_id for block_id, _ in blocks.match_prefix(sequence(range(9)))] == table
        other, _ = run(blocks, range(100, 112))  # two never used blocks, and the tail of the first
        assert [block_id for block_id, _ in blocks.match_prefix(sequence(range(9)))] == table[:1]
        blocks.free(other)
        blocks.check_integrity([])

    def test_blocks_that_hold_nothing_reusable_go_first(self) -> None:
        blocks = manager(num_blocks=4)
        first, _ = run(blocks, range(9))
        full, partial = first.block_table[:2], first.block_table[2]
        blocks.free(first)
        assert blocks._pool.take(3) == (partial, full[1], full[0])

    def test_free_hits_count_as_wanted_and_used_ones_do_not(self) -> None:
        blocks = manager()
        first, _ = run(blocks, range(10))
        new = sequence(range(10))
        assert blocks.num_blocks_wanted(new, blocks.match_prefix(new)) == 1
        blocks.free(first)
        assert blocks.num_blocks_wanted(new, blocks.match_prefix(new)) == 3

    def test_a_block_in_use_is_preferred_to_a_free_duplicate(self) -> None:
        blocks = manager()
        first, _ = run(blocks, range(4))
        second, num_hits = run(blocks, range(4))  # its only block had to be computed again
        assert num_hits == 0
        blocks.free(first)
        assert blocks.match_prefix(sequence(range(5)))[0][0] == second.block_table[0]
        blocks.check_integrity([second])

    def test_dropped_registrations(self) -> None:
        blocks = manager()
        first, _ = run(blocks, range(9))
        registrations = blocks.take_registrations()
        blocks.drop_registrations(registrations)
        assert blocks.match_prefix(sequence(range(9))) == []
        blocks.free(first)
        run(blocks, range(9))
        blocks.drop_registrations(registrations)  # too late: the blocks hold something else's prefix now
        assert len(blocks.match_prefix(sequence(range(9)))) == 2

    def test_errors_leave_only_what_others_filled(self) -> None:
        blocks = manager()
        first, _ = run(blocks, range(5))
        second, _ = run(blocks, range(9))
        blocks.free(second, keep_cached=False)
        assert len(blocks.match_prefix(sequence(range(9)))) == 1
        blocks.check_integrity([first])

    def test_without_prefix_caching_nothing_is_kept(self) -> None:
        blocks = BlockManager(16, 4, enable_prefix_caching=False)
        first, _ = run(blocks, range(9))
        assert blocks.num_cached_blocks == 0
        assert run(blocks, range(9))[1] == 0
        blocks.free(first)

    def test_usage_and_reset(self) -> None:
        blocks = manager(num_blocks=5)
        assert blocks.usage == 0
        first, _ = run(blocks, range(5))
        assert blocks.usage == 0.5
        blocks.free(first)
        assert (blocks.usage, blocks.num_cached_blocks) == (0, 1)
        blocks.reset_prefix_cache()
        assert blocks.num_cached_blocks == 0
        blocks.check_integrity([])

    def test_integrity_names_the_equation(self) -> None:
        blocks = manager()
        first, _ = run(blocks, range(6))
        with pytest.raises(AssertionError, match="references and occurs 0 times"):
            blocks.check_integrity([])
        blocks._cache.register(first.block_table[1], None, (7,))
        with pytest.raises(AssertionError, match="writable block 2 in prefix cache == False"):
            blocks.check_integrity([first])
        blocks._cache.forget(first.block_table[1:2])
        blocks._pool.acquire(first.block_table[1])
        with pytest.raises(AssertionError, match="references of writable block 2 == 1, not 2"):
            blocks.check_integrity([first])
