"""Chooses one token per row from its logits.

The order is vLLM's: log-probabilities come from the raw logits; then masks, bias and penalties; a greedy row
takes the largest logit, any other row draws after temperature, min_p, top_k and top_p.

Two Samplers do this: TorchSampler, here and in logits.py and logprobs.py, and TritonSampler, in
gpu_sampler.py. They give the same tokens but for the rounding of floats.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from halimede.engine.runner.logits import adjust_logits, filter_logits
from halimede.engine.runner.logprobs import token_logprobs
from halimede.engine.runner.sampling_metadata import RandomRows, SamplingMetadata
from halimede.kernels.random_stream import exponential_noise, stream_keys
from halimede.scheduler.output import TokenLogprobs

NOT_FINITE = -1
ALL_FORBIDDEN = -2
_REASONS = {
    NOT_FINITE: (
        "the model's logits are not finite (NaN or infinity); "
        "the weights may be damaged or dtype too narrow: try dtype='bfloat16' or 'float32'"
    ),
    ALL_FORBIDDEN: (
        "no token is left to choose: allowed_token_ids, bad_words and min_tokens together forbid every one; "
        "allow more tokens"
    ),
}


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """Per row of the step's S sampling rows: its token in token_ids, or the reason it has none in errors.

    logprobs: of the rows that asked for them and did not fail.
    """

    token_ids: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


class Sampler(Protocol):
    """How tokens are chosen; a ModelRunner has one. Logits are the model's, in its dtype."""

    def sample(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """Choose the next token of each row of logits (S, V), which may be changed in place.

        metadata: of those rows, its tensors on the CPU.
        """
        ...

    def token_logprobs(
        self, logits: torch.Tensor, token_ids: Sequence[int], num_logprobs: Sequence[int]
    ) -> list[TokenLogprobs]:
        """The log-probabilities at each row of logits (P, V): see logprobs.token_logprobs."""
        ...


def make_sampler(device: torch.device, *, triton: bool) -> Sampler:
    """A sampler for logits on `device`. triton: run Triton kernels, which a CPU interprets."""
    if not triton:
        return TorchSampler()
    from halimede.engine.runner.gpu_sampler import TritonSampler

    return TritonSampler(device)


class TorchSampler:
    """A Sampler of torch operations, made for a CPU."""

    def sample(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """See Sampler.sample."""
        return sample(logits.float(), metadata)

    def token_logprobs(
        self, logits: torch.Tensor, token_ids: Sequence[int], num_logprobs: Sequence[int]
    ) -> list[TokenLogprobs]:
        """See Sampler.token_logprobs."""
        tokens = torch.tensor(token_ids, dtype=torch.int64).to(logits.device)
        return token_logprobs(logits.float(), tokens, num_logprobs)


def sampler_output(
    chosen: Sequence[int], wanted: Sequence[int], entries: Sequence[TokenLogprobs]
) -> SamplerOutput:
    """The output for the chosen tokens or codes of all rows, and log-probabilities of the rows `wanted`."""
    errors = {row: _REASONS[token] for row, token in enumerate(chosen) if token < 0}
    return SamplerOutput(
        {row: token for row, token in enumerate(chosen) if token >= 0},
        {row: entry for row, entry in zip(wanted, entries, strict=True) if row not in errors},
        errors,
    )


def sample(logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
    """Choose the next token of each row of float32 logits (S, V), which are changed in place."""
    wanted = [row for row, n in enumerate(metadata.num_logprobs) if n is not None]
    raw = logits
    if wanted and (metadata.changes_logits or len(wanted) < len(logits)):
        raw = logits[wanted]
    chosen = _choose(logits, metadata)
    counts = [n for n in metadata.num_logprobs if n is not None]
    entries = token_logprobs(raw, chosen[wanted].clamp(min=0), counts) if wanted else []
    return sampler_output(chosen.tolist(), wanted, entries)


def _choose(logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
    """The chosen tokens (S) int64; a negative one is the code of the row's error."""
    if not metadata.changes_logits:
        chosen = _argmax(logits)
        # argmax takes a NaN for the largest, so the chosen logit tells whether the row is sound.
        largest = logits.gather(1, chosen.unsqueeze(1)).squeeze(1)
        return chosen.masked_fill_(~largest.isfinite(), NOT_FINITE)
    broken = ~logits.amax(dim=-1).isfinite()
    adjust_logits(logits, metadata)
    empty = logits.amax(dim=-1) == -torch.inf if metadata.masks_tokens else None
    if metadata.random is None:
        chosen = _argmax(logits)
    elif metadata.random.rows is None:
        chosen = _draw(logits, metadata.random)
    else:
        chosen = _argmax(logits)
        chosen[metadata.random.rows] = _draw(logits[metadata.random.rows], metadata.random)
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
