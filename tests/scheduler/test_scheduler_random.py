"""Random life under the model of scheduler_simulation.py, and proof that it notices broken schedulers."""

from collections.abc import Callable
from typing import Any

import pytest
from scheduler_simulation import Simulation

from halimede.scheduler.block_manager import BlockManager
from halimede.scheduler.block_pool import BlockPool
from halimede.scheduler.config import SchedulerConfig
from halimede.scheduler.prefix_cache import PrefixCache
from halimede.scheduler.scheduler import Scheduler

MAIN: dict[str, Any] = {
    "num_blocks": 32,
    "block_size": 4,
    "max_model_len": 56,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 24,
}
OTHERS: dict[str, dict[str, Any]] = {
    "priority": {"policy": "priority"},
    "priority-few-seqs": {"policy": "priority", "max_num_seqs": 3, "num_blocks": 64},
    "whole-prompts": {"enable_chunked_prefill": False, "max_num_batched_tokens": 40},
    "whole-prompts-priority": {"enable_chunked_prefill": False, "policy": "priority"},
    "no-cache": {"enable_prefix_caching": False},
    "no-cache-priority": {"enable_prefix_caching": False, "policy": "priority", "num_blocks": 24},
    "tiny-steps": {"max_num_batched_tokens": 3, "max_num_seqs": 8, "num_blocks": 24},
    "one-sequence-fits": {"num_blocks": 15},
    "blocks-of-one": {"block_size": 1, "num_blocks": 70},
    "large-pool": {"num_blocks": 400},
}


def run(
    seed: int, num_steps: int, max_sampled: int = 1, trouble: float = 0.002, **changes: Any
) -> Simulation:
    simulation = Simulation(
        SchedulerConfig(**{**MAIN, **changes}), seed, max_sampled=max_sampled, trouble=trouble
    )
    simulation.run(num_steps)
    return simulation


def test_forty_thousand_steps() -> None:
    simulation = run(seed=1, num_steps=40_000)
    assert simulation.scheduler.num_preemptions > 400
    assert simulation.scheduler.prefix_cache_hits > 0.2 * simulation.scheduler.prefix_cache_queries
    assert min(simulation.finished.get(reason, 0) for reason in ("stop", "length", "error")) > 40


@pytest.mark.parametrize("name", OTHERS)
def test_other_configurations(name: str) -> None:
    run(seed=2, num_steps=1500, max_sampled=3 if "priority" in name else 1, **OTHERS[name])


def _content_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def blur(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *args: method(self, *args[:-1], (hash(args[-1]) % 16,))

    monkeypatch.setattr(PrefixCache, "find", blur(PrefixCache.find))
    monkeypatch.setattr(PrefixCache, "register", blur(PrefixCache.register))


def _parent_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    find, register = PrefixCache.find, PrefixCache.register
    monkeypatch.setattr(PrefixCache, "find", lambda self, parent, ids: find(self, None, ids))
    monkeypatch.setattr(
        PrefixCache, "register", lambda self, block, parent, ids: register(self, block, None, ids)
    )


def _salt_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsalted(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *args: method(
            self, *args[:-2], None if isinstance(args[-2], str) else args[-2], args[-1]
        )

    monkeypatch.setattr(PrefixCache, "find", unsalted(PrefixCache.find))
    monkeypatch.setattr(PrefixCache, "register", unsalted(PrefixCache.register))


def _reference_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def acquire(self: BlockPool, block_id: int) -> None:
        if self.ref_counts[block_id] == 0:
            del self._free[block_id]
            self.ref_counts[block_id] = 1

    monkeypatch.setattr(BlockPool, "acquire", acquire)


def _reference_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    release = BlockPool.release

    def leak(self: BlockPool, block_id: int, *, reuse_first: bool) -> None:
        if block_id % 7:
            release(self, block_id, reuse_first=reuse_first)

    monkeypatch.setattr(BlockPool, "release", leak)


def _reused_block_stays_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    grow = BlockManager.grow

    def forgetful(self: BlockManager, *args: Any) -> tuple[int, ...] | None:
        with monkeypatch.context() as patch:
            patch.setattr(PrefixCache, "forget", lambda cache, block_ids: None)
            return grow(self, *args)

    monkeypatch.setattr(BlockManager, "grow", forgetful)


def _failed_step_stays_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockManager, "drop_registrations", lambda self, registrations: None)


def _block_is_cached_before_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    register = BlockManager.register_full_blocks

    def early(self: BlockManager, sequence: Any) -> None:
        known, sequence.num_computed_tokens = sequence.num_computed_tokens, len(sequence.token_ids)
        register(self, sequence)
        sequence.num_computed_tokens = known

    monkeypatch.setattr(BlockManager, "register_full_blocks", early)


def _whole_prompt_is_matched(monkeypatch: pytest.MonkeyPatch) -> None:
    match = BlockManager.match_prefix

    def greedy(self: BlockManager, sequence: Any) -> Any:
        sequence.token_ids.append(0)
        hits = match(self, sequence)
        sequence.token_ids.pop()
        return hits

    monkeypatch.setattr(BlockManager, "match_prefix", greedy)


def _finished_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    remove = Scheduler._remove

    def forget(self: Scheduler, *args: Any, **kwargs: Any) -> None:
        reported = list(self._finished)
        remove(self, *args, **kwargs)
        self._finished = reported

    monkeypatch.setattr(Scheduler, "_remove", forget)


SABOTAGES = (
    _content_is_not_compared,
    _parent_is_not_compared,
    _salt_is_ignored,
    _reference_is_forgotten,
    _reference_is_kept,
    _reused_block_stays_cached,
    _failed_step_stays_cached,
    _block_is_cached_before_it_is_full,
    _whole_prompt_is_matched,
    _finished_is_not_reported,
)
# What check_integrity sees by itself is found even when the content would be right.
SEEN_BY_CONTENT = SABOTAGES[:3] + SABOTAGES[3:4] + SABOTAGES[5:8]


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda s: s.__name__.strip("_"))
def test_the_model_notices(
    sabotage: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch)
    with pytest.raises(AssertionError):
        run(seed=3, num_steps=3000, trouble=0.02)


@pytest.mark.parametrize("sabotage", SEEN_BY_CONTENT, ids=lambda s: s.__name__.strip("_"))
def test_the_content_check_notices_alone(
    sabotage: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch)
    monkeypatch.setattr(Scheduler, "check_integrity", lambda self: None)
    with pytest.raises(AssertionError, match="somebody else's content"):
        run(seed=3, num_steps=3000, trouble=0.02)
