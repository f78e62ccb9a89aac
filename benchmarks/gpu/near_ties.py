"""When greedy tokens of a less exact run count as right: held against float32 logits over those very tokens.

Two logits that are almost equal may change places in bfloat16, and from there on two greedy runs have
different contexts. So a run is not compared with another run's tokens: the reference reads what the run chose
and says, at each place, how far the choice lies below the largest logit there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Of the standard deviation of a position's logits. Of transformers in bfloat16 the largest seen is 0.055, and
# one choice in ten or less is not the best; the second best logit lies 0.24 below in the median.
BFLOAT16_GAP, BFLOAT16_LARGEST = 0.1, 0.8
# Of choices that must be the largest logit with a cache of 8 bits; one of chance would be 1 in 512.
NARROW_LARGEST = {"int8": 0.75, "fp8": 0.6}


@dataclass(frozen=True)
class Choices:
    """gap: the largest distance of a choice from the best logit, in standard deviations.

    largest: the share of choices that are the best logit.
    """

    gap: float
    largest: float


def gaps(logits: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """(S) of float32 logits (S, V): how far each token lies below the largest, in standard deviations."""
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return (logits.amax(dim=1) - chosen) / logits.std(dim=1)


def judge(all_gaps: Sequence[torch.Tensor]) -> Choices:
    """Of the gaps of several answers."""
    joined = torch.cat(list(all_gaps))
    return Choices(joined.max().item(), (joined == 0).float().mean().item())


def right_in_bfloat16(choices: Choices) -> bool:
    """Whether only near ties were decided differently, and not many."""
    return choices.gap <= BFLOAT16_GAP and choices.largest >= BFLOAT16_LARGEST


def right_with_narrow_cache(choices: Choices, kv_cache_dtype: str) -> bool:
    """Whether most tokens are what they should be."""
    return choices.largest >= NARROW_LARGEST[kv_cache_dtype]
