"""Chooses one token per row from its logits.

The order is vLLM's: log-probabilities come from the raw logits; then masks, bias and penalties; a greedy row
takes the largest logit, any other row draws after temperature, min_p, top_k and top_p.

Two samplers do this: TorchSampler, here and in logits.py and logprobs.py, and TritonSampler, in
gpu_sampler.py. They give the same tokens but for the rounding of floats.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from halimede.engine.runner.logits import adjust_logits, filter_logits
from halimede.engine.runner.logprobs import token_logprobs
from halimede.engine.runner.sampling_metadata import RandomRows, SamplingMetadata
from halimede.kernels.random_stream import exponential_noise, stream_keys
from halimede.scheduler.output import TokenLogprobs

NOT_FINITE = -1
ALL_FORBIDDEN = -2
REASONS: Mapping[int, str] = MappingProxyType(
    {
        NOT_FINITE: (
            "the model's logits are not finite (NaN or infinity); "
            "the weights may be damaged or dtype too narrow: try dtype='bfloat16' or 'float32'"
        ),
        ALL_FORBIDDEN: (
            "no token is left to choose: allowed_token_ids, bad_words and min_tokens together forbid every "
            "one; allow more tokens"
        ),
    }
)
"""What the negative numbers mean that stand in place of a token."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a sampler has chosen, where it was chosen: the device may not have got there yet.

    tokens (S) int64: of each row, or a key of REASONS. tensors: what log-probabilities are read from.
    entries: from the tokens of all rows and copies of the tensors on the CPU, the TokenLogprobs of the rows
    that want them.
    """

    tokens: torch.Tensor
    tensors: tuple[torch.Tensor, ...]
    entries: Callable[[Sequence[int], Sequence[torch.Tensor]], list[TokenLogprobs]]


class TorchSampler:
    """Torch operations, made for a CPU."""

    def launch(self, logits: torch.Tensor, metadata: SamplingMetadata, random: RandomRows | None) -> Sample:
        """Choose the next token of each row of logits (S, V), which may be changed in place.

        random: of the rows that draw, if any does.
        """
        logits = logits.float()
        wanted = list(metadata.wanted)
        raw = logits
        if wanted and (metadata.changes_logits or len(wanted) < len(logits)):
            raw = logits[wanted]
        tokens = _choose(logits, metadata, random)
        entries: list[TokenLogprobs] = []
        if wanted:
            entries = token_logprobs(raw, tokens[wanted].clamp(min=0), metadata.num_logprobs)
        return Sample(tokens, (), lambda tokens, copies: entries)


def _choose(logits: torch.Tensor, metadata: SamplingMetadata, random: RandomRows | None) -> torch.Tensor:
    """The chosen tokens (S) int64; a negative one is the code of the row's error."""
    if not metadata.changes_logits:
        chosen = _argmax(logits)
        # argmax takes a NaN for the largest, so the chosen logit tells whether the row is sound.
        largest = logits.gather(1, chosen.unsqueeze(1)).squeeze(1)
        return chosen.masked_fill_(~largest.isfinite(), NOT_FINITE)
    broken = ~logits.amax(dim=-1).isfinite()
    adjust_logits(logits, metadata)
    empty = logits.amax(dim=-1) == -torch.inf if metadata.masks_tokens else None
    if random is None:
        chosen = _argmax(logits)
    elif random.rows is None:
        chosen = _draw(logits, random)
    else:
        chosen = _argmax(logits)
        chosen[random.rows] = _draw(logits[random.rows], random)
    if empty is not None:
        chosen.masked_fill_(empty, ALL_FORBIDDEN)
    return chosen.masked_fill_(broken, NOT_FINITE)


def _draw(logits: torch.Tensor, random: RandomRows) -> torch.Tensor:
    """Draw a token (D) int64 from each row of (D, V) logits, which are changed in place.

    The largest of logit - log(noise), noise ~ Exp(1), is a draw from softmax(logits) (the Gumbel-max trick).
    It needs no normalisation, and a tiny change of the logits rarely changes the token.
    """
    filter_logits(logits, random)
    starts = stream_keys(random.keys, logits.device)
    _add_gumbel_by_row(logits, starts, sparse=random.filters)
    return _argmax(logits)


def _add_gumbel_by_row(logits: torch.Tensor, starts: torch.Tensor, *, sparse: bool) -> None:
    """logits (D, V) -= log(noise), one row at a time, which a CPU's cache holds.

    sparse: most logits are -inf, which no noise changes, so that noise is made for the others only.
    """
    tokens = torch.arange(logits.shape[-1])
    for row, start in zip(logits, starts, strict=True):
        if sparse:
            left = torch.from_numpy(np.flatnonzero(row.numpy() > -np.inf))
            row[left] -= exponential_noise(start, left).log_()
        else:
            row -= exponential_noise(start, tokens).log_()


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """The first of the largest logits, or the first NaN, of each row (S, V): int64 (S)."""
    return torch.from_numpy(logits.numpy().argmax(axis=-1))  # several times faster than torch's
