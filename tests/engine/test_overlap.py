"""Steps launched before the result of the one before is there, against a device that takes its time.

What each request gets must be what the synchronous loop gives it, whatever is added, stopped, aborted or
preempted meanwhile, and whenever the device gets round to a step.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from halimede.engine.core import EngineCore
from halimede.engine.executor.fake import FakeExecutor, fake_next_token
from halimede.scheduler.block_manager import BlockManager
from halimede.scheduler.config import SchedulerConfig
from halimede.scheduler.output import ModelRunnerOutput, SchedulerOutput, SequenceUpdate
from halimede.scheduler.request import Request
from halimede.scheduler.sampling_params import SamplingParams
from halimede.scheduler.scheduler import Scheduler

VOCAB = 6
NUM_SCHEDULES = 10_000


@dataclass(frozen=True)
class Plan:
    """A random life: who comes when, who is aborted after how many tokens, on which engine."""

    config: SchedulerConfig
    arrivals: tuple[tuple[int, Request], ...]
    aborts: dict[str, int]

    @classmethod
    def make(cls, seed: int) -> "Plan":
        rng = random.Random(seed)
        size = rng.choice((1, 2, 4))
        longest = rng.randrange(6, 24)
        config = SchedulerConfig(
            num_blocks=-(-longest // size) + 1 + rng.randrange(0, 24 // size),
            block_size=size,
            max_model_len=longest,
            max_num_seqs=rng.randrange(1, 6),
            max_num_batched_tokens=rng.randrange(5, 24),
            enable_prefix_caching=rng.random() < 0.8,
            policy=rng.choice(("fcfs", "priority")),
        )
        shared = [rng.randrange(VOCAB) for _ in range(longest)]
        arrivals, aborts = [], {}
        for number in range(rng.randrange(1, 7)):
            name = f"r{number}"
            prompt = [*shared[: rng.randrange(longest - 2)], rng.randrange(VOCAB)]
            max_tokens = rng.choice((1, 2, 5, 12, None))
            params = SamplingParams(
                max_tokens=max_tokens,
                min_tokens=rng.choice((0, 0, min(max_tokens or 3, 3))),
                stop_token_ids=rng.choice((None, [1], [1, 2])),
                logprobs=rng.choice((None, None, 1)),
                prompt_logprobs=rng.choice((None, None, None, 0)),
            )
            request = Request(name, tuple(prompt), params, 0, float(number), priority=rng.randrange(3))
            arrivals.append((rng.randrange(10), request))
            if rng.random() < 0.2:
                aborts[name] = rng.randrange(4)
        return cls(config, tuple(arrivals), aborts)


@dataclass
class Seen:
    """What a request's owner was told."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: list[Any] = field(default_factory=list)
    reason: str | None = None
    stop_reason: int | None = None

    def add(self, update: SequenceUpdate) -> None:
        assert self.reason is None, "an update after the last one"
        self.tokens += update.new_token_ids
        self.logprobs += update.logprobs
        self.prompt_logprobs += update.prompt_logprobs
        self.reason, self.stop_reason = update.finish_reason, update.stop_reason


class Device(FakeExecutor):
    """A fake device on a scheduler's config that breaks where it is told to: at a launch or at a collect."""

    def __init__(self, config: SchedulerConfig, seed: int, depth: int, breaks: dict[str, int]) -> None:
        super().__init__(
            config.num_blocks,
            VOCAB,
            config.max_model_len,
            config.block_size,
            max_steps_in_flight=depth,
            timing=random.Random(seed),
        )
        self.breaks = breaks
        self.collected = 0

    def launch(self, output: SchedulerOutput) -> None:
        if self.breaks.get("launch") == output.step:
            raise RuntimeError("no room")
        super().launch(output)

    def collect(self) -> ModelRunnerOutput:
        result = super().collect()
        self.collected += 1
        if self.breaks.get("collect") == self.collected:
            raise RuntimeError("the device is gone")
        return result


def live(plan: Plan, depth: int, seed: int = 0, breaks: dict[str, int] | None = None) -> dict[str, Seen]:
    """Run a plan to its end. With steps in flight the scheduler's books are checked after each turn; those of
    the synchronous loop are in tests/scheduler.
    """
    scheduler = Scheduler(plan.config)
    core = EngineCore(scheduler, Device(plan.config, seed, depth, breaks or {}))
    seen: dict[str, Seen] = {}
    arrivals, turn = sorted(plan.arrivals, key=lambda a: a[0]), 0
    while arrivals or core.has_unfinished:
        while arrivals and arrivals[0][0] <= turn:
            request = arrivals.pop(0)[1]
            core.add(request)
            seen[request.request_id] = Seen()
        for update in core.step():
            seen[update.request_id].add(update)
        if depth > 1:
            scheduler.check_integrity()
        for name, count in plan.aborts.items():
            if name in seen and seen[name].reason is None and len(seen[name].tokens) >= count:
                update = core.abort(name)
                assert update is not None
                seen[name].add(update)
                if depth > 1:
                    scheduler.check_integrity()
        turn += 1
        assert turn < 2000, "requests that never finish"
    assert scheduler.kv_cache_usage == 0
    return seen


def told_alike(plan: Plan, seen: dict[str, Seen]) -> dict[str, Seen]:
    """What may not hang on timing: all but how far a request comes that is aborted after its first step."""
    return {name: one for name, one in seen.items() if plan.aborts.get(name, 1)}


@pytest.mark.parametrize("part", range(4))
def test_ten_thousand_random_schedules_give_what_the_synchronous_loop_gives(part: int) -> None:
    share = NUM_SCHEDULES // 4
    reasons: dict[str | None, int] = {}
    for seed in range(part * share, (part + 1) * share):
        plan = Plan.make(seed)
        expected, got = live(plan, depth=1), live(plan, depth=2, seed=seed)
        assert told_alike(plan, expected) == told_alike(plan, got), f"plan {seed}"
        for one in got.values():
            reasons[one.reason] = reasons.get(one.reason, 0) + 1
    assert min(reasons[reason] for reason in ("stop", "length", "abort")) > share / 10


def test_a_deeper_queue_changes_nothing_either() -> None:
    for seed in range(400):
        plan = Plan.make(seed)
        expected, got = live(plan, depth=1), live(plan, depth=4, seed=seed)
        assert told_alike(plan, expected) == told_alike(plan, got), f"plan {seed}"


def test_nothing_is_waited_for_before_the_next_step_is_launched() -> None:
    plan = Plan.make(3)
    launched: list[int] = []

    class Watch(Device):
        def launch(self, output: SchedulerOutput) -> None:
            super().launch(output)
            launched.append(output.step - self.collected)

    config = replace(plan.config, num_blocks=60, max_model_len=50)
    core = EngineCore(Scheduler(config), Watch(config, 0, 2, {}))
    core.add(Request("r", (1, 2, 3), SamplingParams(max_tokens=20), 0, 0.0))
    while core.has_unfinished:
        core.step()
    assert launched == [0] + [1] * 19


@pytest.mark.parametrize("where", ["launch", "collect"])
def test_a_step_that_breaks_ends_its_own_and_nobody_gets_a_wrong_token(where: str) -> None:
    errors = 0
    for seed in range(300):
        plan = replace(Plan.make(seed), aborts={})
        requests = {request.request_id: request for _, request in plan.arrivals}
        expected = live(plan, depth=1)
        for name, got in live(plan, depth=2, seed=seed, breaks={where: 1 + seed % 7}).items():
            assert got.tokens == expected[name].tokens[: len(got.tokens)], f"plan {seed}"
            known = list(requests[name].prompt_token_ids)
            for token in got.tokens:
                assert token == fake_next_token(known, VOCAB)
                known.append(token)
            if got.reason == "error":
                errors += 1
            else:
                assert got == expected[name]
    assert errors > 100


def test_what_could_be_launched_is_still_collected_when_the_step_behind_it_could_not() -> None:
    plan = Plan.make(3)
    config = replace(plan.config, num_blocks=60, max_model_len=50)
    core = EngineCore(Scheduler(config), Device(config, 0, 2, {"launch": 2}))
    core.add(Request("r", (1, 2, 3), SamplingParams(max_tokens=20), 0, 0.0))
    updates = [core.step(), core.step(), core.step()]
    assert [len(u.new_token_ids) for (u,) in updates] == [1, 1, 0]
    assert updates[2][0].error == "RuntimeError: no room"
    assert not core.has_unfinished
    core.add(Request("s", (1, 2, 3), SamplingParams(max_tokens=2), 0, 0.0))
    tokens = [t for _ in range(3) for u in core.step() for t in u.new_token_ids]
    assert tokens[0] == fake_next_token((1, 2, 3), VOCAB)
    assert len(tokens) == 2


def test_ctrl_c_ends_what_is_in_flight_and_the_engine_goes_on() -> None:
    class Interrupted(Device):
        def collect(self) -> ModelRunnerOutput:
            result = super().collect()
            if self.collected == 3:
                raise KeyboardInterrupt
            return result

    plan = Plan.make(3)
    config = replace(plan.config, num_blocks=60, max_model_len=50)
    scheduler = Scheduler(config)
    core = EngineCore(scheduler, Interrupted(config, 0, 2, {}))
    core.add(Request("r", (1, 2, 3), SamplingParams(max_tokens=20), 0, 0.0))
    with pytest.raises(KeyboardInterrupt):
        for _ in range(10):
            core.step()
    (update,) = core.step()
    assert (update.finish_reason, update.error) == ("error", "interrupted")
    scheduler.check_integrity()
    core.add(Request("s", (1, 2, 3), SamplingParams(max_tokens=2), 0, 0.0))
    tokens = [t for _ in range(3) for u in core.step() for t in u.new_token_ids]
    assert tokens[0] == fake_next_token((1, 2, 3), VOCAB)


def _freed_when_the_result_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake the rule forbids: a preempted sequence gives its blocks back once more when it ends."""
    remove = Scheduler._remove

    def again(self: Scheduler, sequence: Any, **options: Any) -> None:
        table = sequence.block_table or getattr(again, "last", {}).get(sequence.seq_id, [])
        remove(self, sequence, **options)
        for block_id in table:
            self._blocks._pool.release(block_id, reuse_first=False)

    monkeypatch.setattr(Scheduler, "_remove", again)


def _unknown_tokens_are_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block with a token that is still being sampled, in the prefix cache under the tokens before it."""
    register = BlockManager.register_full_blocks

    def early(self: BlockManager, sequence: Any) -> None:
        missing = max(0, sequence.num_computed_tokens - len(sequence.token_ids))
        sequence.token_ids += [1] * missing
        register(self, sequence)
        del sequence.token_ids[len(sequence.token_ids) - missing :]

    monkeypatch.setattr(BlockManager, "register_full_blocks", early)


def _pending_tokens_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preempted sequence starts again before its sampled token is known."""
    admit = Scheduler._admit

    def hasty(self: Scheduler, plan: Any, index: int) -> bool:
        head = self._waiting.peek()
        if head is not None:
            head.num_pending_tokens = 0
        return admit(self, plan, index)

    monkeypatch.setattr(Scheduler, "_admit", hasty)


@pytest.mark.parametrize(
    "sabotage",
    [_freed_when_the_result_comes, _unknown_tokens_are_registered, _pending_tokens_are_forgotten],
    ids=lambda s: s.__name__.strip("_"),
)
def test_these_plans_notice(
    sabotage: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(1500):
        plan = Plan.make(seed)
        wanted = live(plan, depth=1)
        try:
            with monkeypatch.context() as patch:
                sabotage(patch)
                got = live(plan, depth=3, seed=seed)
            assert told_alike(plan, got) == told_alike(plan, wanted)
        except (AssertionError, KeyError, IndexError):
            return
    pytest.fail("no plan notices")
