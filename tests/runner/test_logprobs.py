"""Log-probabilities and ranks of sampled tokens."""

import math

import pytest
import torch
from sampling_reference import new_sequence
from test_sampler import run

from halimede.engine.runner.logprobs import token_logprobs
from halimede.scheduler.sampling_params import SamplingParams


@pytest.mark.parametrize("n", [0, 1, 3, 29, 30, -1, 50])
def test_against_log_softmax(n: int) -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([3, 29, 0, 11])
    entries = token_logprobs(logits, tokens, [n] * 4)
    for row, entry in enumerate(entries):
        expected = logits[row].double().log_softmax(0)
        order = expected.argsort(descending=True).tolist()
        assert list(entry.token_ids) == [tokens[row].item(), *(order if n == -1 else order[:n])]
        assert list(entry.logprobs) == pytest.approx([expected[t].item() for t in entry.token_ids], abs=1e-5)
        assert list(entry.ranks) == [order.index(t) + 1 for t in entry.token_ids]


def test_each_row_has_its_own_count() -> None:
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(1))
    counts = [2, 0, -1]
    together = token_logprobs(logits, torch.tensor([0, 1, 2]), counts)
    assert [len(entry.token_ids) for entry in together] == [3, 1, 31]
    for row, count in enumerate(counts):
        alone = token_logprobs(logits[row : row + 1], torch.tensor([row]), [count])
        assert alone[0].token_ids == together[row].token_ids
        assert alone[0].ranks == together[row].ranks


def test_equal_logits_come_in_order_of_token_id_and_share_a_rank() -> None:
    logits = torch.zeros(1, 3000)
    logits[0, [2500, 40]] = 1.0
    (entry,) = token_logprobs(logits, torch.tensor([2999]), [4])
    assert entry.token_ids == (2999, 40, 2500, 0, 1)
    assert entry.ranks == (3, 1, 1, 3, 3)


def test_minus_infinity_is_a_logprob() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    (entry,) = token_logprobs(logits, torch.tensor([1]), [-1])
    assert entry.token_ids == (1, 0, 2, 1)
    assert entry.logprobs == pytest.approx((-math.inf, math.log(0.5), math.log(0.5), -math.inf))
    assert entry.ranks == (3, 1, 1, 3)


def test_they_come_from_the_raw_logits() -> None:
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(2))
    expected = logits.double().log_softmax(1)
    params = SamplingParams(
        temperature=0.3, top_k=1, logit_bias={7: 100.0}, repetition_penalty=2.0, logprobs=2
    )
    output = run(logits, [new_sequence(p) for p in (SamplingParams(temperature=0), params)])
    assert output.token_ids[1] == 7
    assert list(output.logprobs) == [1]
    entry = output.logprobs[1]
    assert entry.token_ids == (7, *expected[1].argsort(descending=True)[:2].tolist())
    assert entry.logprobs[0] == pytest.approx(expected[1, 7].item(), abs=1e-5)
    assert entry.ranks[0] == 1 + int((expected[1] > expected[1, 7]).sum())
