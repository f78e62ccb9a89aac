"""The executor without a model: right tokens from right scheduling, other tokens from wrong scheduling."""

import random
import subprocess
import sys

import pytest
from sampling_reference import new_sequence

from halimede.engine.executor.fake import FakeExecutor, fake_next_token
from halimede.errors import EngineDeadError
from halimede.scheduler.config import SchedulerConfig
from halimede.scheduler.output import NewSequence, ScheduledSequence, SchedulerOutput
from halimede.scheduler.request import Request
from halimede.scheduler.sampling_params import SamplingParams
from halimede.scheduler.scheduler import Scheduler

VOCAB = 97
PROMPT = (5, 6, 7, 8, 9, 10)


def introduce(seq_id: int, prompt: tuple[int, ...], blocks: tuple[int, ...], upto: int) -> ScheduledSequence:
    new = new_sequence(SamplingParams(), prompt=prompt)
    return ScheduledSequence(seq_id, upto, 0, blocks, upto == len(prompt), new)


def step(*scheduled: ScheduledSequence, finished: tuple[int, ...] = ()) -> SchedulerOutput:
    return SchedulerOutput(0, scheduled, finished)


def make() -> FakeExecutor:
    return FakeExecutor(10, VOCAB, 64, block_size=4)


def test_tokens_depend_on_the_tokens_so_far() -> None:
    executor, tokens = make(), list(PROMPT)
    result = executor.execute(step(introduce(0, PROMPT, (3, 1), 6)))
    for _ in range(2):
        expected = fake_next_token(tokens, VOCAB)
        assert result.sampled_token_ids == {0: (expected,)}
        tokens.append(expected)
        row = ScheduledSequence(0, 1, len(tokens) - 1, (), True)
        result = executor.execute(step(row))
    assert len({fake_next_token(PROMPT[:n], VOCAB) for n in range(1, 7)}) > 3


def test_chunks_and_blocks_change_nothing() -> None:
    executor = make()
    assert executor.execute(step(introduce(0, PROMPT, (3,), 3))).sampled_token_ids == {}
    result = executor.execute(step(ScheduledSequence(0, 3, 3, (7,), True)))
    assert result.sampled_token_ids[0][0] == fake_next_token(PROMPT, VOCAB)


@pytest.mark.parametrize("table", [(1, 3), (3, 5), (5, 1), (3, 3)])
def test_a_wrong_block_table_changes_the_token(table: tuple[int, int]) -> None:
    prompt = tuple(range(9))
    executor = make()
    executor.execute(step(introduce(0, prompt, (3, 1, 2), 8)))
    wrong = introduce(1, prompt, (*table, 4), 9)._replace(num_tokens=1, num_computed_tokens=8)
    right = wrong._replace(seq_id=2, new_block_ids=(3, 1, 6))
    result = executor.execute(step(wrong, right))
    assert result.sampled_token_ids[2][0] == fake_next_token(prompt, VOCAB)
    assert result.sampled_token_ids[1][0] != fake_next_token(prompt, VOCAB)


def test_an_overwritten_block_changes_the_token() -> None:
    executor = make()
    executor.execute(step(introduce(0, PROMPT, (3, 1), 5)))
    executor.execute(step(introduce(1, (50, 51), (3,), 2)))
    result = executor.execute(step(ScheduledSequence(0, 1, 5, (), True)))
    assert result.sampled_token_ids[0][0] != fake_next_token(PROMPT, VOCAB)


@pytest.mark.parametrize(
    "row",
    [
        ScheduledSequence(9, 1, 0, (1,), True),
        introduce(0, PROMPT, (0, 1), 6),
        introduce(0, PROMPT, (1, 10), 6),
        introduce(0, PROMPT, (1,), 6),
        introduce(0, PROMPT, (1, 2), 6)._replace(num_tokens=7),
        introduce(0, PROMPT, (1, 2), 6)._replace(needs_sample=False),
        introduce(0, PROMPT, (1, 2), 5)._replace(needs_sample=True),
    ],
)
def test_nonsense_is_an_assertion(row: ScheduledSequence) -> None:
    with pytest.raises(AssertionError):
        make().execute(step(row))


def test_forgotten_and_shut_down() -> None:
    executor = make()
    executor.execute(step(introduce(0, PROMPT, (1, 2), 5)))
    assert executor.execute(step(finished=(0, 77))).sampled_token_ids == {}
    with pytest.raises(AssertionError, match="never introduced"):
        executor.execute(step(ScheduledSequence(0, 1, 5, (), True)))
    executor.shutdown()
    executor.shutdown()
    with pytest.raises(EngineDeadError):
        executor.execute(step())


def test_logprobs_have_the_right_form() -> None:
    params = SamplingParams(logprobs=2, prompt_logprobs=0)
    new = NewSequence(Request("r", PROMPT, params, 0, 0.0), PROMPT, 6)
    executor = make()
    first = executor.execute(step(ScheduledSequence(0, 4, 0, (1, 2), False, new)))
    second = executor.execute(step(ScheduledSequence(0, 2, 4, (), True)))
    entries = first.prompt_logprobs[0] + second.prompt_logprobs[0]
    assert [entry.token_ids for entry in entries] == [(token,) for token in PROMPT[1:]]
    assert second.logprobs[0][0].token_ids == (*second.sampled_token_ids[0], 0, 1)


def test_with_the_scheduler() -> None:
    """Few blocks, so that sequences are preempted, and shared prefixes."""
    rng = random.Random(0)
    config = SchedulerConfig(12, block_size=4, max_model_len=40, max_num_seqs=5, max_num_batched_tokens=7)
    scheduler, executor = Scheduler(config), FakeExecutor(12, VOCAB, 40, block_size=4)
    prompts = {str(n): (*range(1, 9), *rng.choices(range(VOCAB), k=rng.randrange(1, 8))) for n in range(10)}
    for name, prompt in prompts.items():
        scheduler.add(Request(name, prompt, SamplingParams(max_tokens=12), 0, 0.0))
    outputs: dict[str, list[int]] = {name: [] for name in prompts}
    while scheduler.has_unfinished:
        output = scheduler.schedule()
        for update in scheduler.update(output, executor.execute(output)):
            outputs[update.request_id] += update.new_token_ids
    assert scheduler.num_preemptions
    assert scheduler.prefix_cache_hits
    for name, prompt in prompts.items():
        tokens = list(prompt)
        for _ in range(12):
            tokens.append(fake_next_token(tokens, VOCAB))
        assert outputs[name] == tokens[len(prompt) :]


def test_no_torch() -> None:
    code = "import sys, halimede.engine.executor.fake; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
