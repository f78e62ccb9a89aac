"""The Triton sampler, interpreted, gives the torch sampler's tokens, log-probabilities and errors."""

import math
import random

import numpy as np
import pytest
import torch
from sampling_reference import new_sequence, plan_of
from test_sampler import VOCAB, Choice, choice_of, metadata_of, random_logits, random_sequence, run

from halimede.engine.runner import sampler
from halimede.engine.runner.gpu_sampler import RandomTensors, TritonSampler
from halimede.engine.runner.logprobs import token_logprobs
from halimede.kernels.gpu import sampling_draw
from halimede.scheduler.output import NewSequence, TokenLogprobs
from halimede.scheduler.sampling_params import SamplingParams

CPU = torch.device("cpu")


def assert_same_logprobs(ours: TokenLogprobs, theirs: TokenLogprobs) -> None:
    assert ours.token_ids == theirs.token_ids
    assert ours.ranks == theirs.ranks
    assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def run_triton(logits: torch.Tensor, news: list[NewSequence], sampler: TritonSampler | None = None) -> Choice:
    plan, table = plan_of(news, logits.shape[-1])
    columns, slots = table.columns, plan.layout.slots
    keys = np.stack([columns.seed[slots], plan.seq_lens.astype(np.int64)], axis=1)
    columns_of = (columns.temperature, columns.min_p, columns.top_k, columns.top_p)
    random = RandomTensors(*(torch.from_numpy(c[slots]) for c in columns_of), torch.from_numpy(keys))
    metadata = metadata_of(news, logits.shape[-1])
    sampler = sampler or TritonSampler(CPU)
    return choice_of(sampler.launch(logits.clone(), metadata, random if metadata.draws else None), metadata)


def assert_same(ours: Choice, theirs: Choice) -> None:
    assert ours.token_ids == theirs.token_ids
    assert ours.errors == theirs.errors
    assert ours.logprobs.keys() == theirs.logprobs.keys()
    for row, entry in ours.logprobs.items():
        assert_same_logprobs(entry, theirs.logprobs[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_parameters(dtype: torch.dtype) -> None:
    rng = random.Random(3)
    ours = TritonSampler(CPU)
    for trial in range(3):
        news = [random_sequence(rng) for _ in range(16)]
        logits = random_logits(len(news), seed=trial).to(dtype)
        assert_same(run_triton(logits, news, ours), run(logits, news))


def test_several_blocks_of_a_vocabulary() -> None:
    rng = random.Random(5)
    vocab_size = 1500
    news = [
        new_sequence(
            SamplingParams(
                temperature=rng.choice([0.0, 0.7, 1.3]),
                top_k=rng.choice([0, 3, 300]),
                top_p=rng.choice([1.0, 0.9]),
                min_p=rng.choice([0.0, 0.02]),
                repetition_penalty=rng.choice([1.0, 1.3]),
                logit_bias={rng.randrange(vocab_size): 4.0},
                allowed_token_ids=rng.choice([None, list(range(0, vocab_size, 3))]),
                logprobs=rng.choice([None, 0, 7]),
            ),
            prompt=tuple(rng.choices(range(vocab_size), k=30)),
            seed=rng.getrandbits(64),
        )
        for _ in range(8)
    ]
    logits = random_logits(len(news), seed=1, vocab_size=vocab_size)
    assert_same(run_triton(logits, news), run(logits, news))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(top_p=0.5)])
def test_a_row_without_a_token_fails_alone(params: SamplingParams, broken: float) -> None:
    logits = random_logits(5, seed=2)
    logits[1, 7] = broken
    logits[2] = -math.inf
    news = [
        new_sequence(params),
        new_sequence(params.replace(allowed_token_ids=[3, 4], logprobs=2)),  # token 7 is hidden
        new_sequence(params, bad_words=((5,),)),
        new_sequence(params.replace(allowed_token_ids=[4, 5]), bad_words=((4,), (5,))),
        new_sequence(params.replace(logprobs=1)),
    ]
    ours = run_triton(logits, news)
    assert_same(ours, run(logits, news))
    assert 2 in ours.errors
    assert "no token is left" in ours.errors[3]


@pytest.mark.parametrize("n", [0, 5, -1, 200])
def test_prompt_logprobs(n: int) -> None:
    """200 of 300 tokens are more than the kernel finds."""
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens, counts = [0, 299, 17], [n, 2, n]
    pending = TritonSampler(CPU).launch_logprobs(logits, tokens, counts)
    theirs = token_logprobs(logits.float(), torch.tensor(tokens), counts)
    for entry, other in zip(pending.read(pending.tensors), theirs, strict=True):
        assert_same_logprobs(entry, other)


def test_nothing_asked_and_a_growing_batch() -> None:
    ours = TritonSampler(CPU)
    greedy = new_sequence(SamplingParams(temperature=0))
    for rows in (1, 3, 2):
        logits = random_logits(rows, seed=rows)
        output = run_triton(logits, [greedy] * rows, ours)
        assert list(output.token_ids.values()) == logits.argmax(1).tolist()
        assert (output.logprobs, output.errors) == ({}, {})


def test_codes() -> None:
    assert (sampling_draw.NOT_FINITE, sampling_draw.ALL_FORBIDDEN) == (
        sampler.NOT_FINITE,
        sampler.ALL_FORBIDDEN,
    )
    assert VOCAB % 32  # the last word of a mask is not full
