"""The sampler against a per-row reference, alone and in mixed batches."""

import dataclasses
import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from sampling_reference import adjusted, filtered, new_sequence, plan_of

from halimede.engine.runner.logits import adjust_logits, filter_logits, keep_top_p
from halimede.engine.runner.row_table import RowTable
from halimede.engine.runner.sampler import REASONS, Sample, TorchSampler
from halimede.engine.runner.sampling_metadata import (
    RandomRows,
    SamplingMetadata,
    build_sampling_metadata,
    random_rows,
)
from halimede.kernels.random_stream import exponential_noise, stream_keys, torch_bits
from halimede.scheduler.output import NewSequence, ScheduledSequence, SchedulerOutput, TokenLogprobs
from halimede.scheduler.sampling_params import SamplingParams

VOCAB = 40
CPU = torch.device("cpu")


def metadata_of(news: list[NewSequence], vocab_size: int = VOCAB) -> SamplingMetadata:
    return build_sampling_metadata(plan_of(news, vocab_size)[0], vocab_size=vocab_size)


def random_of(news: list[NewSequence], vocab_size: int = VOCAB) -> RandomRows | None:
    plan, table = plan_of(news, vocab_size)
    return random_rows(plan, table.columns, vocab_size)


@dataclasses.dataclass
class Choice:
    """By row: its token, or why it has none; log-probabilities of the rows that want them."""

    token_ids: dict[int, int]
    logprobs: dict[int, TokenLogprobs]
    errors: dict[int, str]


def choice_of(found: Sample, metadata: SamplingMetadata) -> Choice:
    tokens = found.tokens.tolist()
    entries = found.entries(tokens, found.tensors)
    return Choice(
        {row: token for row, token in enumerate(tokens) if token >= 0},
        {row: e for row, e in zip(metadata.wanted, entries, strict=True) if tokens[row] >= 0},
        {row: REASONS[token] for row, token in enumerate(tokens) if token < 0},
    )


def run(logits: torch.Tensor, news: list[NewSequence]) -> Choice:
    vocab_size = logits.shape[-1]
    metadata = metadata_of(news, vocab_size)
    return choice_of(TorchSampler().launch(logits.clone(), metadata, random_of(news, vocab_size)), metadata)


def random_logits(rows: int, seed: int, vocab_size: int = VOCAB) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab_size, generator=generator) * 3
    # Coarse values, as from a 16-bit model, so that there are ties.
    return (logits * 4).round() / 4


def assert_same(found: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)


OUTPUT = (5, 7, 5, 9, 5, 7)
FEATURES = {
    "allowed": new_sequence(SamplingParams(allowed_token_ids=[3, 5, 7, 39])),
    "allowed_outside_vocabulary": new_sequence(SamplingParams(allowed_token_ids=[3, 5, 4000])),
    "bad_word": new_sequence(SamplingParams(), output=OUTPUT, bad_words=((4,), (6,))),
    "bad_words_long": new_sequence(
        SamplingParams(),
        prompt=(1, 2, 8),
        output=OUTPUT,
        bad_words=((5, 7, 11), (7, 5, 12), (5, 13), (8, 5, 7, 5, 9, 5, 7, 14), (7, 99)),
    ),
    "bad_words_prompt_does_not_count": new_sequence(
        SamplingParams(), prompt=(1, 5), output=(), bad_words=((5, 7),)
    ),
    "min_tokens_short": new_sequence(
        SamplingParams(min_tokens=7, stop_token_ids=[4, 4000]), output=OUTPUT, eos=(2, 3)
    ),
    "min_tokens_reached": new_sequence(
        SamplingParams(min_tokens=6, stop_token_ids=[4]), output=OUTPUT, eos=(2, 3)
    ),
    "bias": new_sequence(SamplingParams(logit_bias={3: 2.5, 8: -100, 39: 100, 4000: 1})),
    "repetition": new_sequence(SamplingParams(repetition_penalty=1.7), output=OUTPUT),
    "repetition_below_one": new_sequence(SamplingParams(repetition_penalty=0.6), output=OUTPUT),
    "frequency": new_sequence(SamplingParams(frequency_penalty=0.7), output=OUTPUT),
    "presence": new_sequence(SamplingParams(presence_penalty=-1.3), output=OUTPUT),
    "penalties": new_sequence(
        SamplingParams(repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.9), output=OUTPUT
    ),
}


@pytest.mark.parametrize("name", FEATURES)
def test_adjusted_logits(name: str) -> None:
    new = FEATURES[name]
    for seed in range(10):
        logits = random_logits(1, seed)
        expected = adjusted(logits[0].tolist(), new)
        if name != "min_tokens_reached" and "does_not" not in name:
            assert expected != logits[0].tolist()
        adjust_logits(logits, metadata_of([new]))
        assert_same(logits[0], expected)


FILTERS = [
    SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m)
    for t, k, p, m in itertools.product(
        (1.0, 0.3, 2.0), (0, 1, 5, 39, 1000), (1.0, 0.9, 0.4, 1e-6), (0, 0.1, 1)
    )
]


def test_filtered_logits() -> None:
    news = [new_sequence(params) for params in FILTERS]
    logits = random_logits(len(news), seed=1)
    expected = [filtered(row, params) for row, params in zip(logits.tolist(), FILTERS, strict=True)]
    random = random_of(news)
    assert random is not None
    filter_logits(logits, random)
    for row, values in zip(logits, expected, strict=True):
        assert_same(row, values)


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    for p, kept in ((0.35, [1]), (0.41, [1, 3]), (0.71, [1, 2, 3]), (0.95, [0, 1, 2, 3]), (1e-9, [1])):
        logits = probabilities.log()
        keep_top_p(logits, torch.tensor([p]))
        assert logits.isfinite().nonzero()[:, 1].tolist() == kept, p
    ties = torch.zeros(1, 10)
    keep_top_p(ties, torch.tensor([0.35]))
    assert ties.isfinite().nonzero()[:, 1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 8.0])
def test_top_p_with_a_large_vocabulary(spread: float) -> None:
    """Flat rows have more candidates than the fast path looks at; both paths agree with a full sort."""
    generator = torch.Generator().manual_seed(3)
    rough = (torch.randn(6, 5000, generator=generator) * spread).bfloat16().float()
    rough[1] *= 10  # a peaked row among flat ones
    p = torch.tensor([0.9, 0.5, 0.01, 0.999, 0.9, 0.1])
    logits = rough.clone()
    keep_top_p(logits, p)
    for row in range(len(p)):
        values, order = rough[row].double().sort(descending=True, stable=True)
        before = values.softmax(0).cumsum(0) - values.softmax(0)
        expected = set(order[before < p[row].item() - 1e-6].tolist())
        slack = set(order[before < p[row].item() + 1e-6].tolist())
        kept = set(logits[row].isfinite().nonzero()[:, 0].tolist())
        assert expected <= kept <= slack
        alone = rough[row : row + 1].clone()
        keep_top_p(alone, p[row : row + 1])
        assert torch.equal(alone[0], logits[row])


def random_sequence(rng: random.Random) -> NewSequence:
    """A sequence with a random subset of all features."""

    def maybe(value: Any, default: Any) -> Any:
        return value if rng.random() < 0.5 else default

    params = SamplingParams(
        temperature=maybe(rng.uniform(0.2, 2), 0.0),
        top_k=maybe(rng.randint(1, VOCAB), 0),
        top_p=maybe(rng.uniform(0.1, 1), 1.0),
        min_p=maybe(rng.uniform(0, 0.3), 0.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        repetition_penalty=maybe(rng.uniform(0.5, 2), 1.0),
        logprobs=maybe(rng.randint(-1, 5), None),
        min_tokens=rng.randint(0, 8),
        stop_token_ids=[rng.randrange(VOCAB)],
        logit_bias=maybe({rng.randrange(VOCAB): rng.uniform(-5, 5)}, None),
        allowed_token_ids=maybe(rng.sample(range(VOCAB), 20), None),
    )
    tokens = tuple(rng.choices(range(VOCAB), k=10))
    words = tuple(tuple(rng.choices(tokens, k=rng.randint(1, 2))) for _ in range(3))
    return new_sequence(
        params, prompt=tokens[:4], output=tokens[4:], seed=rng.getrandbits(70), eos=(0,), bad_words=words
    )


def test_mixed_batch_equals_each_row_alone_and_the_reference() -> None:
    rng = random.Random(7)
    for trial in range(20):
        news = [random_sequence(rng) for _ in range(8)]
        logits = random_logits(8, seed=trial)
        together = run(logits, news)
        order = rng.sample(range(8), 5)
        shuffled = run(logits[order], [news[row] for row in order])
        for row, new in enumerate(news):
            alone = run(logits[row : row + 1], [new])
            assert alone.token_ids[0] == together.token_ids[row]
            assert alone.logprobs.get(0) == together.logprobs.get(row)
            params = new.request.sampling_params
            expected = adjusted(logits[row].tolist(), new)
            if params.greedy:
                assert together.token_ids[row] == expected.index(max(expected))
            else:
                kept = filtered(expected, params)
                noise = noise_of([(new.request.seed, 10)], VOCAB)[0].tolist()
                scores = [x - math.log(e) for x, e in zip(kept, noise, strict=True)]
                assert together.token_ids[row] == scores.index(max(scores))
        for at, row in enumerate(order):
            assert shuffled.token_ids[at] == together.token_ids[row]


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    logits = torch.zeros(2, 5000)
    logits[0, [4000, 17, 900]] = 1.0
    greedy = SamplingParams(temperature=0)
    assert run(logits, [new_sequence(greedy)] * 2).token_ids == {0: 17, 1: 0}
    mixed = [new_sequence(greedy), new_sequence(greedy.replace(logit_bias={17: -1.0}))]
    assert run(logits[[0, 0]], mixed).token_ids == {0: 17, 1: 900}


def test_greedy_batch_touches_nothing_but_argmax() -> None:
    news = [new_sequence(SamplingParams(temperature=0, top_k=3, top_p=0.5, min_p=0.1))] * 2
    metadata = metadata_of(news)
    assert not metadata.changes_logits
    assert not metadata.filters
    assert random_of(news) is None


def test_features_nobody_uses_are_none() -> None:
    news = [new_sequence(SamplingParams()), new_sequence(SamplingParams(temperature=0))]
    metadata, random = metadata_of(news), random_of(news)
    assert random is not None
    assert random.rows is not None
    assert random.rows.tolist() == [0]
    assert [random.min_p, random.top_k, random.top_p] == [None] * 3
    assert (metadata.draws, metadata.filters, metadata.wanted) == (True, False, ())
    assert [metadata.banned, metadata.bias, metadata.penalties, metadata.forbidden] == [None, None, None, ()]


def test_counts_follow_generated_tokens() -> None:
    params = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.5, min_tokens=2)
    words = ((4, 5, 8),)
    before = new_sequence(params, output=(4,), eos=(6,), bad_words=words)
    after = new_sequence(params, output=(4, 5), eos=(6,), bad_words=words)
    table, length = RowTable(2, VOCAB), len(before.token_ids)
    table.plan(SchedulerOutput(0, (ScheduledSequence(0, length, 0, (1,), True, before),)))
    state = table.state(0)
    assert state is not None
    state.append_token(5)
    again = ScheduledSequence(0, 1, length, (), True)
    fresh = ScheduledSequence(1, length + 1, 0, (2,), True, after)
    plan = table.plan(SchedulerOutput(1, (again, fresh)))
    assert plan is not None
    logits = random_logits(2, seed=0)
    logits[1] = logits[0]
    metadata = build_sampling_metadata(plan, vocab_size=VOCAB)
    adjust_logits(logits, metadata)
    assert torch.equal(logits[0], logits[1])
    assert metadata.banned is not None
    assert [tensor.tolist() for tensor in metadata.banned] == [[0, 1], [8, 8]]


def starts_of(keys: list[tuple[int, int]]) -> torch.Tensor:
    signed = [((seed + (1 << 63)) % (1 << 64) - (1 << 63), position) for seed, position in keys]
    return stream_keys(np.array(signed, dtype=np.int64), CPU)


def noise_of(keys: list[tuple[int, int]], vocab_size: int) -> torch.Tensor:
    return exponential_noise(starts_of(keys).unsqueeze(1), torch.arange(vocab_size))


def test_noise_depends_on_seed_position_and_token_only() -> None:
    keys = [(0, 0), (0, 1), (1, 0), (-1, 5), (2**64 + 3, 9), (1 << 32, 0)]
    together = noise_of(keys, 101)
    for row, key in enumerate(keys):
        assert torch.equal(noise_of([key], 101)[0], together[row])
    assert len(set(together.flatten().tolist())) == together.numel()
    assert together.isfinite().all()
    assert (together > 0).all()
    some = torch.tensor([7, 99, 3])
    assert torch.equal(exponential_noise(starts_of([keys[2]]), some), together[2, some])


def test_noise_is_splitmix64() -> None:
    """The reference generator's first outputs from state 0 are those of tokens 1, 2, 3."""
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    noise = exponential_noise(torch.zeros(1, dtype=torch.int64), torch.tensor([1, 2, 3]))
    expected = [-math.log1p(-((z >> 32) + 0.5) / 2**32) for z in first]
    assert noise.tolist() == pytest.approx(expected, rel=1e-6)


def test_every_device_has_the_same_bits() -> None:
    """The arithmetic that GPUs run, run here."""
    starts = starts_of([(seed, 3) for seed in range(50)]).unsqueeze(1)
    tokens = torch.arange(300)
    uniform = (torch_bits(starts, tokens) + 0.5) * 2.0**-32
    expected = -torch.log1p(-uniform.clamp(max=1 - 2.0**-24))
    assert torch.equal(exponential_noise(starts, tokens), expected)


def test_noise_is_exponential() -> None:
    noise = noise_of([(1, p) for p in range(20)], 5000).flatten().double()
    assert noise.mean().item() == pytest.approx(1, abs=0.02)
    assert noise.var().item() == pytest.approx(1, abs=0.05)
    for x in (0.01, 0.5, 3.0):
        assert (noise > x).double().mean().item() == pytest.approx(math.exp(-x), abs=0.006)


def test_neighbouring_streams_are_independent() -> None:
    for keys in ([(1, p) for p in range(200)], [(s, 1) for s in range(200)]):
        noise = noise_of(keys, 400).double()
        noise = (noise - noise.mean()) / noise.std()
        for a, b in (
            (noise[:-1], noise[1:]),
            (noise[:, :-1], noise[:, 1:]),
            (noise[:-1, 1:], noise[1:, :-1]),
        ):
            assert abs((a * b).mean().item()) < 0.015


@pytest.mark.parametrize("by", ["position", "seed"])
def test_draws_follow_the_distribution(by: str) -> None:
    """Chi-square over draws at successive positions of one request, and at one position of many requests."""
    draws = 4000
    probabilities = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.04, 0.01])
    logits = probabilities.log().expand(draws, -1).clone()
    news = [new_sequence(SamplingParams(), seed=11)]
    metadata, random = metadata_of(news, 6), random_of(news, 6)
    assert random is not None
    keys = [(11, n) if by == "position" else (n, 11) for n in range(draws)]
    many = dataclasses.replace(random, keys=np.array(keys, dtype=np.int64))
    counts = torch.bincount(TorchSampler().launch(logits, metadata, many).tokens, minlength=6)
    expected = probabilities * draws
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 15.09  # the 99th percentile with 5 degrees of freedom; the seeds are fixed


def test_different_seeds_differ() -> None:
    logits = torch.zeros(2, 5000)
    output = run(logits, [new_sequence(SamplingParams(), seed=1), new_sequence(SamplingParams(), seed=2)])
    assert output.token_ids[0] != output.token_ids[1]


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_p=0.5)]
)
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_fails_alone(params: SamplingParams, broken: float) -> None:
    logits = random_logits(3, seed=2)
    sound = run(logits, [new_sequence(params)] * 3)
    if broken == -math.inf:
        logits[1] = broken
    else:
        logits[1, 7] = broken
    output = run(logits, [new_sequence(params.replace(logprobs=2))] * 3)
    assert list(output.errors) == [1]
    assert "not finite" in output.errors[1]
    assert output.token_ids == {row: sound.token_ids[row] for row in (0, 2)}
    assert sorted(output.logprobs) == [0, 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_every_token_forbidden_fails_alone(temperature: float) -> None:
    params = SamplingParams(temperature=temperature)
    news = [
        new_sequence(params),
        new_sequence(params.replace(allowed_token_ids=[4, 5]), bad_words=((4,), (5,))),
        new_sequence(params.replace(allowed_token_ids=[4, 5]), bad_words=((4,),)),
    ]
    output = run(random_logits(3, seed=0), news)
    assert list(output.errors) == [1]
    assert "no token is left" in output.errors[1]
    assert output.token_ids[2] == 5
    assert 0 in output.token_ids
