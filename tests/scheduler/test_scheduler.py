"""Who runs when: admission, budget, chunks, preemption, priorities, the prefix cache."""

from typing import Any

import pytest
from scheduler_driver import Driver, request

from halimede.errors import ConfigError, RequestError
from halimede.scheduler.config import SchedulerConfig
from halimede.scheduler.policy import WaitingQueue
from halimede.scheduler.prefix_cache import PrefixCache
from halimede.scheduler.scheduler import Scheduler
from halimede.scheduler.sequence import Sequence


class TestLimits:
    def test_kv_cache_too_small_for_one_sequence(self) -> None:
        with pytest.raises(ConfigError) as error:
            Scheduler(SchedulerConfig(num_blocks=9, block_size=16, max_model_len=129))
        for words in ("9 blocks of 16", "hold 128 tokens", "max_model_len=129", "at most 128"):
            assert words in str(error.value)
        for remedy in ("kv_cache_memory_bytes", "gpu_memory_utilization"):
            assert remedy in str(error.value)
        Scheduler(SchedulerConfig(num_blocks=9, block_size=16, max_model_len=128))

    @pytest.mark.parametrize("num_blocks", [-1, 0, 1])
    def test_no_kv_cache_at_all(self, num_blocks: int) -> None:
        with pytest.raises(ConfigError, match="hold 0 tokens"):
            SchedulerConfig(num_blocks=num_blocks)

    @pytest.mark.parametrize(
        "values", [{"block_size": 0}, {"max_num_seqs": 0}, {"max_num_batched_tokens": 0}, {"policy": "lifo"}]
    )
    def test_config_out_of_range(self, values: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=f"{next(iter(values))}="):
            SchedulerConfig(num_blocks=1000, **values)

    def test_requests_that_can_never_run(self) -> None:
        driver = Driver(max_model_len=10)
        with pytest.raises(RequestError, match="'a' has an empty prompt"):
            driver.add("a", [])
        with pytest.raises(RequestError, match=r"'a' has 10 tokens.*max_model_len=10.*shorten") as error:
            driver.add("a", range(10))
        assert "raise max_model_len" in str(error.value)
        driver.add("a", range(9))
        with pytest.raises(RequestError, match="'a' is already being served"):
            driver.add("a", [1])
        assert driver.scheduler.num_waiting == 1

    def test_request_id_is_free_again_when_finished(self) -> None:
        driver = Driver()
        first = driver.add("a", [1], max_tokens=1)
        driver.step()
        assert driver.add("a", [1]) != first

    def test_prompt_longer_than_a_step_needs_chunks(self) -> None:
        driver = Driver(enable_chunked_prefill=False, max_num_batched_tokens=8)
        with pytest.raises(RequestError, match=r"9 tokens.*enable_chunked_prefill=False.*tokens=8"):
            driver.add("a", range(9))
        driver.add("a", range(8))
        assert driver.step() == {"a": 8}


class TestBatching:
    def test_running_first_then_waiting(self) -> None:
        driver = Driver()
        driver.add("a", range(5))
        assert driver.step() == {"a": 5}
        driver.add("b", range(50, 57))
        assert driver.step() == {"a": 1, "b": 7}
        assert driver.step() == {"a": 1, "b": 1}

    def test_rows_say_what_changed(self) -> None:
        driver = Driver()
        seq_id = driver.add("a", range(7))
        driver.schedule()
        (row,) = driver.output.scheduled
        assert row.new is not None
        assert (row.new.token_ids, row.new.num_prompt_tokens) == (tuple(range(7)), 7)
        assert (row.seq_id, row.num_tokens, row.num_computed_tokens) == (seq_id, 7, 0)
        assert (row.new_block_ids, row.needs_sample) == ((1, 2), True)
        driver.update(40)
        driver.schedule()
        assert driver.output.scheduled == ((seq_id, 1, None, (), True, None),)
        driver.update(41)
        driver.schedule()
        assert driver.output.scheduled == ((seq_id, 1, 8, (3,), True, None),)
        for token in (42, 43):
            driver.update(token)
            driver.schedule()
            assert driver.output.scheduled == ((seq_id, 1, None, (), True, None),)

    def test_long_prompts_run_in_chunks_beside_decodes(self) -> None:
        driver = Driver(max_num_batched_tokens=10)
        driver.add("a", range(3))
        driver.step()
        driver.add("b", range(20, 45))
        assert driver.schedule() == {"a": 1, "b": 9}
        assert [row.needs_sample for row in driver.output.scheduled] == [True, False]
        assert [update.request_id for update in driver.update()] == ["a"]
        assert driver.step() == {"a": 1, "b": 9}
        assert driver.schedule() == {"a": 1, "b": 7}
        assert driver.output.scheduled[1].needs_sample

    def test_whole_prompts_wait_for_a_step_with_room(self) -> None:
        driver = Driver(max_num_batched_tokens=10, enable_chunked_prefill=False)
        driver.add("a", range(6), max_tokens=2)
        driver.add("b", range(20, 30))
        driver.add("c", [1])
        assert driver.step() == {"a": 6}  # b does not fit, and c does not overtake it
        assert driver.step() == {"a": 1}
        assert driver.step() == {"b": 10}
        assert driver.step() == {"b": 1, "c": 1}

    def test_whole_prompts_that_outgrew_a_step_are_split_when_resumed(self) -> None:
        driver = Driver(
            num_blocks=11, max_model_len=40, max_num_batched_tokens=9, enable_chunked_prefill=False
        )
        driver.add("a", range(8))
        driver.add("b", range(50, 58))
        driver.step_until_preempted()
        driver.update()
        assert driver.preempted() == ["b"]
        driver.scheduler.abort("a")
        driver.scheduler.reset_prefix_cache()
        assert [driver.step()["b"] for _ in range(3)] == [9, 9, 2]

    def test_max_num_seqs(self) -> None:
        driver = Driver(max_num_seqs=2)
        for name in "abc":
            driver.add(name, [1, 2], max_tokens=2)
        assert list(driver.step()) == ["a", "b"]
        assert (driver.scheduler.num_running, driver.scheduler.num_waiting) == (2, 1)
        driver.step()
        assert driver.step() == {"c": 2}
        assert driver.finished() == ["a", "b"]

    def test_a_prompt_starts_when_all_of_it_has_blocks(self) -> None:
        driver = Driver(num_blocks=11, max_model_len=40, max_num_batched_tokens=8)
        driver.add("a", range(10))
        driver.add("b", range(50, 80))  # 8 blocks of the 7 that a leaves
        driver.step()
        assert driver.step() == {"a": 2}
        assert driver.scheduler.num_waiting == 1
        driver.scheduler.abort("a")
        assert driver.step() == {"b": 8}

    def test_kv_cache_usage(self) -> None:
        driver = Driver(num_blocks=26)
        assert driver.scheduler.kv_cache_usage == 0
        driver.add("a", range(20))
        driver.step()
        assert driver.scheduler.kv_cache_usage == pytest.approx(5 / 25)
        driver.scheduler.abort("a")
        assert driver.scheduler.kv_cache_usage == 0

    def test_nothing_to_do(self) -> None:
        driver = Driver()
        assert not driver.scheduler.has_unfinished
        assert driver.schedule() == {}
        assert driver.update() == []


class TestPreemption:
    def fill(self, **changes: Any) -> Driver:
        """Two sequences that outgrow ten blocks after some steps."""
        driver = Driver(num_blocks=11, max_model_len=40, **changes)
        driver.add("a", range(14), priority=1)
        driver.add("b", range(50, 64), priority=0)
        driver.step()
        return driver

    @pytest.mark.parametrize(("policy", "victim", "other"), [("fcfs", "b", "a"), ("priority", "a", "b")])
    def test_victim(self, policy: str, victim: str, other: str) -> None:
        driver = self.fill(policy=policy)
        scheduled = driver.step_until_preempted()
        assert driver.preempted() == [victim]
        assert scheduled == {other: 1}
        assert driver.scheduler.num_preemptions == 1
        assert driver.scheduler.num_waiting == 1

    def test_resumption_sends_all_tokens_and_keeps_the_output(self) -> None:
        driver = self.fill()
        driver.step_until_preempted()
        driver.update()
        driver.add("c", [1])
        driver.scheduler.abort("a")
        assert list(driver.schedule()) == ["b", "c"]  # b goes before who came later
        row = driver.output.scheduled[0]
        assert row.new is not None
        assert row.new.token_ids[:14] == tuple(range(50, 64))
        assert row.new.token_ids[14:] == (7,) * 7
        assert row.new.num_prompt_tokens == 14
        assert row.num_computed_tokens > 0  # its own blocks were still cached
        assert row.needs_sample
        update = driver.update()[0]
        assert update.num_cached_tokens == 0  # those of the first time count

    def test_a_lone_sequence_reaches_the_end(self) -> None:
        driver = Driver(num_blocks=11, max_model_len=40)
        driver.add("a", range(10))
        driver.add("b", range(50, 60))
        for _ in range(200):
            if not driver.scheduler.has_unfinished:
                break
            driver.step()
        assert not driver.scheduler.has_unfinished

    def test_aborting_a_preempted_request_is_not_told_twice(self) -> None:
        driver = self.fill()
        driver.step_until_preempted()
        driver.update()
        driver.scheduler.abort("b")
        driver.step()
        assert driver.finished() == []


class TestPriority:
    def test_order_is_priority_then_arrival(self) -> None:
        driver = Driver(policy="priority", max_num_seqs=1)
        driver.add("late", [1], priority=1, arrival_time=9, max_tokens=1)
        driver.add("early", [1], priority=1, arrival_time=3, max_tokens=1)
        driver.add("urgent", [1], priority=-1, arrival_time=10, max_tokens=1)
        assert [list(driver.step()) for _ in range(3)] == [["urgent"], ["early"], ["late"]]

    def test_fcfs_ignores_priority(self) -> None:
        driver = Driver(max_num_seqs=1)
        driver.add("first", [1], priority=5, arrival_time=9, max_tokens=1)
        driver.add("second", [1], priority=0, arrival_time=1, max_tokens=1)
        assert [list(driver.step()) for _ in range(2)] == [["first"], ["second"]]

    def test_better_priority_takes_the_place_of_the_worst(self) -> None:
        driver = Driver(policy="priority", max_num_seqs=2)
        driver.add("a", [1, 2], priority=2)
        driver.add("b", [1, 2], priority=1)
        driver.step()
        driver.add("equal", [1, 2], priority=2, arrival_time=-5)
        driver.step()
        assert driver.preempted() == []  # an earlier arrival is no reason
        driver.add("c", [5, 6, 7], priority=0)
        assert driver.step() == {"c": 3, "b": 1}
        assert driver.preempted() == ["a"]

    def test_better_priority_takes_blocks(self) -> None:
        driver = Driver(policy="priority", num_blocks=11, max_model_len=40)
        driver.add("a", range(20), priority=1)
        driver.add("b", range(30, 50), priority=2)
        driver.step()
        driver.add("c", range(60, 80), priority=0)
        assert driver.schedule() == {"c": 20}  # b made way for c, and then a had no block to go on with
        assert driver.preempted() == ["b", "a"]

    def test_nobody_is_preempted_in_vain(self) -> None:
        driver = Driver(policy="priority", num_blocks=11, max_model_len=40)
        driver.add("a", range(30), priority=0)
        driver.add("b", range(40, 44), priority=2)
        driver.step()
        driver.add("c", range(60, 72), priority=1)  # 3 blocks: with those of b there are still only 2
        assert driver.step() == {"a": 1, "b": 1}
        assert driver.preempted() == []


class TestPrefixCache:
    def test_equal_prompts_of_one_step_share(self) -> None:
        driver = Driver()
        driver.add("a", range(10))
        driver.add("b", range(10))
        assert driver.schedule() == {"a": 10, "b": 2}
        first, second = driver.output.scheduled
        assert first.new_block_ids[:2] == second.new_block_ids[:2]
        assert (second.num_computed_tokens, second.num_tokens) == (8, 2)
        assert [update.num_cached_tokens for update in driver.update()] == [0, 8]

    def test_chunks_share_what_is_computed(self) -> None:
        driver = Driver(max_num_batched_tokens=11)
        driver.add("a", range(20))
        driver.step()
        driver.add("b", range(20))
        assert driver.schedule() == {"a": 9, "b": 2}
        assert driver.output.scheduled[1].num_computed_tokens == 16  # the last ones in this very step

    def test_output_is_cached_too(self) -> None:
        driver = Driver()
        driver.add("a", range(6), max_tokens=7)
        for _ in range(7):
            driver.step(30)
        driver.add("b", [*range(6), *[30] * 6, 1])
        driver.schedule()
        assert driver.output.scheduled[0].num_computed_tokens == 12

    def test_counters_count_prompt_tokens(self) -> None:
        driver = Driver()
        driver.add("a", range(10))
        driver.add("b", range(10))
        driver.add("c", range(10), skip_reading_prefix_cache=True)
        assert driver.step() == {"a": 10, "b": 2, "c": 10}
        assert (driver.scheduler.prefix_cache_queries, driver.scheduler.prefix_cache_hits) == (20, 8)

    def test_blocks_are_registered_even_if_not_read(self) -> None:
        driver = Driver()
        driver.add("a", range(10), prompt_logprobs=0)
        driver.step()
        driver.add("b", range(10))
        driver.add("c", range(10), prompt_logprobs=0)
        assert driver.step() == {"a": 1, "b": 2, "c": 10}

    def test_salt(self) -> None:
        driver = Driver()
        for name, salt in (("a", "x"), ("b", "y"), ("c", None), ("d", "x")):
            driver.add(name, range(10), salt=salt)
        assert driver.step() == {"a": 10, "b": 10, "c": 10, "d": 2}

    def test_disabled(self) -> None:
        driver = Driver(enable_prefix_caching=False)
        driver.add("a", range(10))
        driver.add("b", range(10))
        assert driver.step() == {"a": 10, "b": 10}
        assert driver.scheduler.prefix_cache_queries == 0

    def test_reset_only_while_nothing_runs(self) -> None:
        driver = Driver()
        driver.add("a", range(10))
        driver.step()
        assert not driver.scheduler.reset_prefix_cache()
        driver.scheduler.abort("a")
        assert driver.scheduler.reset_prefix_cache()
        driver.add("b", range(10))
        assert driver.step() == {"b": 10}

    def test_each_block_is_hashed_once_and_none_between(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lookups: list[int] = []
        for name in ("find", "register"):
            method = getattr(PrefixCache, name)
            monkeypatch.setattr(
                PrefixCache, name, lambda self, *a, method=method: (lookups.append(1), method(self, *a))[1]
            )
        driver = Driver(max_num_batched_tokens=8)
        driver.add("a", range(30))
        for _ in range(4):
            driver.step()
        assert len(lookups) == 1 + 7  # one look, which misses, then the seven full blocks
        for _ in range(40):
            driver.step()
        assert len(lookups) == 1 + 17

    def test_looking_up_again_is_rare_while_there_is_no_room(self, monkeypatch: pytest.MonkeyPatch) -> None:
        driver = Driver(num_blocks=200, max_model_len=700, max_num_batched_tokens=1000)
        driver.add("a", range(600))
        driver.add("b", [*range(400), *range(1000, 1250)])  # 100 blocks cached, 63 wanted, 49 free
        lookups: list[int] = []
        find = PrefixCache.find
        monkeypatch.setattr(PrefixCache, "find", lambda self, *a: (lookups.append(1), find(self, *a))[1])
        for _ in range(20):
            driver.step()
        assert driver.scheduler.num_waiting == 1
        assert len(lookups) == 1 + 5 * 101  # a's, and in every fourth step b's


def test_waiting_queue_forgets_the_discarded() -> None:
    queue = WaitingQueue()
    sequences = [Sequence(i, request(f"r{i}", [1]), (0, 0.0, i), 10) for i in range(100)]
    for sequence in sequences:
        queue.push(sequence)
    for sequence in sequences[1:]:
        queue.discard(sequence)
    assert len(queue) == 1
    assert len(queue._heap) <= 3
    assert queue.sequences() == sequences[:1]
    assert queue.pop() is sequences[0]
    assert queue.peek() is None
