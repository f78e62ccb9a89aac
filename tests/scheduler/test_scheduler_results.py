"""What comes back: stop rules, logprobs, errors, aborts and failed steps."""

from typing import Any

import pytest
from scheduler_driver import Driver

from halimede.scheduler.output import ModelRunnerOutput, SequenceUpdate, TokenLogprobs


def logprobs(*tokens: int) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs((token,), (-1.0,), (1,)) for token in tokens)


def run(driver: Driver, tokens: list[int]) -> SequenceUpdate:
    """One token a step, until the request is finished."""
    for token in tokens:
        driver.schedule()
        (update,) = driver.update(token)
        assert update.new_token_ids == (token,)
        if update.finish_reason is not None:
            break
    return update


STOPS: dict[str, tuple[dict[str, Any], list[int], tuple[str | None, int | None, int]]] = {
    "goes on": ({}, [5, 6], (None, None, 2)),
    "eos": ({"eos": [9]}, [5, 9, 6], ("stop", None, 2)),
    "stop token": ({"stop_token_ids": [8]}, [5, 8, 6], ("stop", 8, 2)),
    "eos before stop token": ({"eos": [9], "stop_token_ids": [9]}, [9], ("stop", None, 1)),
    "max_tokens": ({"max_tokens": 2}, [5, 6, 7], ("length", None, 2)),
    "stop before length": ({"max_tokens": 2, "eos": [9]}, [5, 9], ("stop", None, 2)),
    "min_tokens": ({"min_tokens": 3, "eos": [9], "stop_token_ids": [8]}, [9, 8, 9], ("stop", None, 3)),
    "min and max": ({"min_tokens": 2, "max_tokens": 2, "eos": [9]}, [9, 5], ("length", None, 2)),
    "max_model_len": ({}, [5] * 20, ("length", None, 10)),
    "max_model_len before min_tokens": ({"min_tokens": 50, "eos": [5]}, [5] * 20, ("length", None, 10)),
    "max_tokens beyond max_model_len": ({"max_tokens": 500}, [5] * 20, ("length", None, 10)),
}


@pytest.mark.parametrize("name", STOPS)
def test_stop_rules(name: str) -> None:
    values, tokens, (reason, stop_reason, count) = STOPS[name]
    driver = Driver(max_model_len=13)
    driver.add("a", [1, 2, 3], **values)
    update = run(driver, tokens)
    assert (update.finish_reason, update.stop_reason) == (reason, stop_reason)
    assert sum(len(s.token_ids) for s in driver.scheduler._sequences.values()) in (0, 3 + count)
    assert driver.scheduler.has_unfinished == (reason is None)
    if reason is not None:
        driver.schedule()
        assert driver.finished() == ["a"]
        assert driver.scheduler.kv_cache_usage == 0


@pytest.mark.parametrize(
    ("values", "kept", "reason"),
    [
        ({"eos": [9]}, (5, 9), "stop"),
        ({"max_tokens": 3}, (5, 9, 6), "length"),
        ({}, (5, 9, 6, 7), None),
        ({"eos": [9], "min_tokens": 3, "max_tokens": 3}, (5, 9, 6), "length"),
    ],
)
def test_several_tokens_of_a_step_end_at_the_stop(
    values: dict[str, Any], kept: tuple[int, ...], reason: str | None
) -> None:
    driver = Driver()
    seq_id = driver.add("a", [1, 2, 3], logprobs=0, **values)
    driver.schedule()
    (update,) = driver.update(5, 9, 6, 7, logprobs={seq_id: logprobs(5, 9, 6, 7)})
    assert update == SequenceUpdate("a", kept, logprobs(*kept), finish_reason=reason)
    if reason is None:
        assert driver.schedule() == {"a": 4}  # none of them is computed yet


def test_logprobs_are_passed_through() -> None:
    driver = Driver(max_num_batched_tokens=4)
    first = driver.add("a", [1, 2, 3, 4, 5, 6], logprobs=0, prompt_logprobs=0)
    driver.schedule()
    assert driver.update(prompt_logprobs={first: logprobs(2, 3, 4, 5)}) == [
        SequenceUpdate("a", prompt_logprobs=logprobs(2, 3, 4, 5))
    ]
    driver.schedule()
    results = {"logprobs": {first: logprobs(7)}, "prompt_logprobs": {first: logprobs(6)}}
    assert driver.update(7, **results) == [SequenceUpdate("a", (7,), logprobs(7), logprobs(6))]


def test_prompt_logprobs_come_once_though_the_prompt_is_computed_twice() -> None:
    driver = Driver(num_blocks=6, max_model_len=20, max_num_batched_tokens=8)
    driver.add("first", [50, 51, 52], max_tokens=12)
    seq_id = driver.add("a", range(11), prompt_logprobs=0)
    seen: list[int] = []
    starts: list[int] = []
    for _ in range(40):
        driver.schedule()
        entries = {}
        for row in driver.output.scheduled:
            start = row.num_computed_tokens
            if row.seq_id == seq_id and start is not None and start < 10:
                entries[seq_id] = logprobs(*range(start + 1, min(start + row.num_tokens, 10) + 1))
                starts.append(start)
        for update in driver.update(prompt_logprobs=entries):
            seen += [entry.token_ids[0] for entry in update.prompt_logprobs]
    assert driver.scheduler.num_preemptions == 1
    assert starts == [0, 5, 0, 8]
    assert seen == list(range(1, 11))


class TestErrors:
    def test_a_row_that_failed(self) -> None:
        driver = Driver()
        bad = driver.add("bad", range(9))
        driver.add("good", range(50, 59))
        driver.schedule()
        updates = driver.update(errors={bad: "not finite"})
        assert updates[0] == SequenceUpdate("bad", finish_reason="error", error="not finite")
        assert updates[1].new_token_ids == (7,)
        driver.add("again", range(9))
        assert driver.step() == {"good": 1, "again": 9}  # what it computed is not trusted
        assert driver.finished() == ["bad"]

    def test_a_missing_token_ends_only_its_request(self) -> None:
        driver = Driver()
        driver.add("a", [1])
        good = driver.add("b", [2])
        driver.schedule()
        updates = driver.scheduler.update(driver.output, ModelRunnerOutput({good: (3,)}))
        assert [update.finish_reason for update in updates] == ["error", None]
        assert "no token" in str(updates[0].error)

    def test_failed_step(self) -> None:
        driver = Driver(max_num_seqs=2)
        driver.add("done", range(30, 34), max_tokens=1)
        driver.step()
        driver.add("a", range(9))
        driver.add("b", range(9))
        driver.add("waits", range(9))
        assert driver.schedule() == {"a": 9, "b": 1}
        assert driver.finished() == ["done"]
        updates = driver.scheduler.fail_step(driver.output, "out of memory")
        driver.scheduler.check_integrity()
        assert updates == [
            SequenceUpdate("a", finish_reason="error", error="out of memory"),
            SequenceUpdate("b", num_cached_tokens=8, finish_reason="error", error="out of memory"),
        ]
        assert driver.step() == {"waits": 9}  # nothing of the failed step is in the cache
        assert driver.finished() == ["done", "a", "b"]
        driver.add("older", [*range(30, 34), 1])
        assert driver.step() == {"waits": 1, "older": 1}  # what earlier steps wrote is

    def test_failed_step_repeats_preemptions(self) -> None:
        driver = Driver(num_blocks=11, max_model_len=40)
        driver.add("a", range(14))
        driver.add("b", range(50, 64))
        driver.step_until_preempted()
        driver.scheduler.fail_step(driver.output, "x")
        assert list(driver.step()) == ["b"]
        assert driver.preempted() == ["b"]
        assert driver.output.scheduled[0].new is not None


class TestAbort:
    def test_waiting(self) -> None:
        driver = Driver(max_num_seqs=1)
        driver.add("a", [1])
        driver.add("b", [1])
        driver.step()
        assert driver.scheduler.abort("b") == SequenceUpdate("b", finish_reason="abort")
        assert driver.scheduler.num_waiting == 0
        driver.step()
        assert driver.finished() == []  # the runner never knew it

    def test_running_is_told_to_the_runner(self) -> None:
        driver = Driver()
        driver.add("a", [1])
        driver.step()
        assert driver.scheduler.abort("a") == SequenceUpdate("a", finish_reason="abort")
        assert driver.scheduler.abort("a") is None
        assert not driver.scheduler.has_unfinished
        assert driver.schedule() == {}
        assert driver.finished() == ["a"]
        driver.schedule()
        assert driver.finished() == []

    def test_between_schedule_and_update(self) -> None:
        driver = Driver()
        driver.add("a", range(9))
        driver.add("b", [1])
        driver.schedule()
        driver.scheduler.abort("a")
        assert [update.request_id for update in driver.update()] == ["b"]
        driver.add("c", range(9))
        assert driver.step() == {"b": 1, "c": 1}  # the step wrote its blocks all the same

    def test_between_schedule_and_failure(self) -> None:
        driver = Driver()
        driver.add("a", range(9))
        driver.schedule()
        driver.scheduler.abort("a")
        assert driver.scheduler.fail_step(driver.output, "x") == []
        driver.add("c", range(9))
        assert driver.step() == {"c": 9}
