"""The runner on a tiny checkpoint, driven by the scheduler, against transformers."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCAB_SIZE, load_model, make_kv_caches, transformers_model, write_tiny_checkpoint

from halimede.engine.models.base import CausalLM
from halimede.engine.runner import model_runner
from halimede.engine.runner.build_runner import make_host_runner
from halimede.engine.runner.rows import RowLimits
from halimede.scheduler.config import SchedulerConfig
from halimede.scheduler.output import ModelRunnerOutput, SchedulerOutput, SequenceUpdate, TokenLogprobs
from halimede.scheduler.request import Request
from halimede.scheduler.sampling_params import SamplingParams
from halimede.scheduler.scheduler import Scheduler

NUM_OUTPUT = 8
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT)
CPU = torch.device("cpu")
RNG = random.Random(5)
SHARED = tuple(RNG.choices(range(3, VOCAB_SIZE), k=20))
PROMPTS = [tuple(RNG.choices(range(3, VOCAB_SIZE), k=n)) for n in (1, 4, 17, 33, 40)] + [
    (*SHARED, 9),
    (*SHARED, 8),
]
Logits = Callable[[Sequence[int]], torch.Tensor]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> CausalLM:
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Logits:
    """transformers' logits (S, V) of a sequence."""
    judge: Any = transformers_model(checkpoint)

    def logits(tokens: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = judge(torch.tensor([list(tokens)])).logits[0].double()
        return found

    return logits


@pytest.fixture(scope="module")
def greedy_outputs(reference: Logits) -> list[list[int]]:
    outputs = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(NUM_OUTPUT):
            tokens.append(int(reference(tokens)[-1].argmax()))
        outputs.append(tokens[len(prompt) :])
    return outputs


@dataclass
class Result:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    error: str | None = None

    def add(self, update: SequenceUpdate) -> None:
        self.token_ids += update.new_token_ids
        self.logprobs += update.logprobs
        self.prompt_logprobs += update.prompt_logprobs
        self.error = update.error


class Engine:
    """A scheduler and a runner over a KV cache that holds NaN wherever nothing was written."""

    def __init__(self, model: CausalLM, num_blocks: int = 64, block_size: int = 4, **settings: Any) -> None:
        defaults = {"max_model_len": 64, "max_num_seqs": 8, "max_num_batched_tokens": 64}
        self.scheduler = Scheduler(SchedulerConfig(num_blocks, block_size, **(defaults | settings)))
        caches = make_kv_caches(model, num_blocks, block_size, fill=math.nan)
        for kv_cache in caches:
            for cache in kv_cache.tensors:
                cache[0] = 0.0
        config = self.scheduler._config
        limits = RowLimits(
            config.max_num_seqs, config.max_num_batched_tokens, config.max_model_len, block_size
        )
        self.runner = make_host_runner(model, caches, limits)

    def run(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[Result]:
        results = [Result() for _ in prompts]
        for number, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
            self.scheduler.add(Request(str(number), tuple(prompt), p, seed=100 + number, arrival_time=0.0))
        while self.scheduler.has_unfinished:
            output = self.scheduler.schedule()
            for update in self.scheduler.update(output, self.runner.execute(output)):
                results[int(update.request_id)].add(update)
        return results


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 8},
        {"max_num_batched_tokens": 13, "max_num_seqs": 3},
        {"block_size": 1, "num_blocks": 400},
        {"block_size": 16, "max_num_batched_tokens": 17},
        {"enable_prefix_caching": False},
        {"max_num_seqs": 1},
    ],
)
def test_greedy_tokens_are_those_of_transformers(
    model: CausalLM, greedy_outputs: list[list[int]], settings: dict[str, Any]
) -> None:
    results = Engine(model, **settings).run(PROMPTS, [GREEDY] * len(PROMPTS))
    assert [result.token_ids for result in results] == greedy_outputs


def test_preemption_changes_nothing(model: CausalLM, greedy_outputs: list[list[int]]) -> None:
    engine = Engine(model, num_blocks=18, max_num_batched_tokens=16)
    results = engine.run(PROMPTS, [GREEDY] * len(PROMPTS))
    assert engine.scheduler.num_preemptions
    assert [result.token_ids for result in results] == greedy_outputs


SAMPLED = SamplingParams(
    max_tokens=NUM_OUTPUT, top_p=0.9, repetition_penalty=1.3, frequency_penalty=0.4, logprobs=1
)


def test_drawn_tokens_do_not_depend_on_the_company(model: CausalLM) -> None:
    params = [SAMPLED.replace(temperature=0.5 + 0.2 * n) for n in range(len(PROMPTS))]
    together = Engine(model).run(PROMPTS, params)
    crowded = Engine(model, num_blocks=18, max_num_batched_tokens=16)
    preempted = crowded.run(PROMPTS, params)
    alone = Engine(model, max_num_seqs=1, max_num_batched_tokens=7).run(PROMPTS, params)
    assert crowded.scheduler.num_preemptions
    tokens = [result.token_ids for result in together]
    assert tokens == [result.token_ids for result in alone] == [result.token_ids for result in preempted]
    assert all(len(result.logprobs) == NUM_OUTPUT for result in preempted)


@pytest.mark.parametrize("budget", [8, 13, 64])
@pytest.mark.parametrize("slice_size", [3, 256])
def test_prompt_logprobs_over_chunks(
    model: CausalLM, reference: Logits, monkeypatch: pytest.MonkeyPatch, budget: int, slice_size: int
) -> None:
    monkeypatch.setattr(model_runner, "_PROMPT_LOGITS_SLICE", slice_size)
    params = [GREEDY.replace(prompt_logprobs=n, logprobs=2) for n in (2, 0, 1, 2, -1)] + [GREEDY] * 2
    results = Engine(model, max_num_batched_tokens=budget).run(PROMPTS, params)
    for prompt, p, result in zip(PROMPTS, params, results, strict=True):
        if p.prompt_logprobs is None:
            assert result.prompt_logprobs == result.logprobs == []
            continue
        tokens = [*prompt, *result.token_ids]
        expected = reference(tokens).log_softmax(-1)
        entries = [*result.prompt_logprobs, *result.logprobs]
        assert len(entries) == len(tokens) - 1
        for position, entry in enumerate(entries):
            token, row = tokens[position + 1], expected[position]
            count = p.prompt_logprobs if position + 1 < len(prompt) else 2
            assert len(entry.token_ids) == 1 + (VOCAB_SIZE if count == -1 else count)
            assert entry.token_ids[0] == token
            assert list(entry.logprobs) == pytest.approx(row[list(entry.token_ids)].tolist(), abs=1e-3)
            assert entry.ranks[0] == 1 + int((row > row[token]).sum())


def test_prompt_logprobs_after_a_preemption(model: CausalLM, reference: Logits) -> None:
    engine = Engine(model, num_blocks=18, max_num_batched_tokens=16)
    results = engine.run(PROMPTS, [GREEDY.replace(prompt_logprobs=0)] * len(PROMPTS))
    assert engine.scheduler.num_preemptions
    for prompt, result in zip(PROMPTS, results, strict=True):
        expected = reference(prompt).log_softmax(-1)
        found = [entry.logprobs[0] for entry in result.prompt_logprobs]
        assert found == pytest.approx([expected[i, t].item() for i, t in enumerate(prompt[1:])], abs=1e-3)


def test_an_output_that_only_forgets(model: CausalLM) -> None:
    engine = Engine(model)
    engine.run(PROMPTS[:2], [GREEDY] * 2)
    output = engine.scheduler.schedule()
    assert output.finished_seq_ids
    assert engine.runner.execute(output) == ModelRunnerOutput({})
    assert engine.runner.execute(SchedulerOutput(99, (), (7,), (8,))) == ModelRunnerOutput({})


def test_a_request_whose_logits_break_fails_alone(checkpoint: Path, greedy_outputs: list[list[int]]) -> None:
    model = load_model(checkpoint)
    broken = next(
        t
        for t in range(3, VOCAB_SIZE)
        if not any(t in (*p, *o) for p, o in zip(PROMPTS, greedy_outputs, strict=True))
    )
    with torch.no_grad():
        model.model.embed_tokens.weight[broken] = math.nan
    results = Engine(model).run([*PROMPTS, (5, broken)], [GREEDY] * 8)
    assert [result.token_ids for result in results[:-1]] == greedy_outputs
    assert results[-1].token_ids == []
    assert results[-1].error is not None
    assert "not finite" in results[-1].error
