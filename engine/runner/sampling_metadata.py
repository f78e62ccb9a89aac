"""What the sampler must know of a step's rows, as tensors; None where no row uses a feature.

S is the number of rows that sample, V the vocabulary size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from halimede.engine.runner.sequence_state import SequenceState
from halimede.scheduler.sampling_params import SamplingParams

_Value = Callable[[SamplingParams], float]


@dataclass(frozen=True, slots=True)
class Penalties:
    """The tokens that penalties touch, C of them in all rows together.

    rows, token_ids (C) int64; output_counts (C) int32; repetition, frequency, presence (C) float32.
    """

    rows: torch.Tensor
    token_ids: torch.Tensor
    output_counts: torch.Tensor
    repetition: torch.Tensor
    frequency: torch.Tensor
    presence: torch.Tensor


@dataclass(frozen=True, slots=True)
class RandomRows:
    """The rows that draw: rows (D) int64, None if all rows do.

    keys: (seed, position of the new token) of each. temperature, min_p: float32 (D, 1).
    top_k (D) int64, V for rows without it; top_p (D) float32, 1 for rows without it.
    """

    rows: torch.Tensor | None
    keys: list[tuple[int, int]]
    temperature: torch.Tensor
    min_p: torch.Tensor | None
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None

    @property
    def filters(self) -> bool:
        """Whether any row may draw from part of the vocabulary only."""
        return self.min_p is not None or self.top_k is not None or self.top_p is not None


@dataclass(frozen=True, slots=True)
class SamplingMetadata:
    """How the next token of each of the S rows is chosen.

    forbidden: (row, mask (V) bool) of rows with allowed_token_ids.
    banned: (rows, token ids), int64 pairs of equal length: bad words, and stop tokens before min_tokens.
    bias: (rows, token ids, float32 values).
    num_logprobs: per row, how many of the most probable tokens to report besides the sampled one
        (-1: all of them); None for rows that report nothing.
    """

    forbidden: tuple[tuple[int, torch.Tensor], ...]
    banned: tuple[torch.Tensor, torch.Tensor] | None
    bias: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    penalties: Penalties | None
    random: RandomRows | None
    num_logprobs: tuple[int | None, ...]

    @property
    def masks_tokens(self) -> bool:
        """Whether a row might be left without a token to choose."""
        return bool(self.forbidden) or self.banned is not None

    @property
    def adjusts_logits(self) -> bool:
        """Whether anything is done to the logits of a row that can change which is the largest."""
        return self.masks_tokens or self.bias is not None or self.penalties is not None

    @property
    def changes_logits(self) -> bool:
        """Whether anything is done to the logits of a row before its token is chosen."""
        return self.adjusts_logits or self.random is not None


def build_sampling_metadata(states: Sequence[SequenceState], *, vocab_size: int) -> SamplingMetadata:
    """The SamplingMetadata of the sequences that sample in this step, in row order, on the CPU."""
    params = [state.request.sampling_params for state in states]
    return SamplingMetadata(
        forbidden=tuple((row, s.forbidden) for row, s in enumerate(states) if s.forbidden is not None),
        banned=_banned(states, vocab_size),
        bias=_bias(params, vocab_size),
        penalties=_penalties(states),
        random=_random(states, vocab_size),
        num_logprobs=tuple(p.logprobs for p in params),
    )


def _banned(states: Sequence[SequenceState], vocab_size: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    pairs = [(row, t) for row, state in enumerate(states) for t in state.banned_token_ids() if t < vocab_size]
    if not pairs:
        return None
    rows, tokens = torch.tensor(pairs, dtype=torch.int64).unbind(1)
    return rows, tokens


def _bias(
    params: Sequence[SamplingParams], vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    entries = [
        (row, token, value)
        for row, p in enumerate(params)
        if p.logit_bias
        for token, value in p.logit_bias.items()
        if token < vocab_size
    ]
    if not entries:
        return None
    rows, tokens, values = zip(*entries, strict=True)
    return (
        torch.tensor(rows, dtype=torch.int64),
        torch.tensor(tokens, dtype=torch.int64),
        torch.tensor(values, dtype=torch.float32),
    )


def _column(params: Sequence[SamplingParams], value: _Value) -> torch.Tensor:
    """(len(params), 1) float32."""
    return torch.tensor([[value(p)] for p in params], dtype=torch.float32)


def _penalties(states: Sequence[SequenceState]) -> Penalties | None:
    used = [
        (row, s.request.sampling_params, s.counts) for row, s in enumerate(states) if s.counts is not None
    ]
    if not used:
        return None
    sizes = [len(counts.token_ids) for _, _, counts in used]

    def repeated(values: list[float], dtype: type) -> torch.Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=dtype), sizes))

    return Penalties(
        rows=repeated([row for row, _, _ in used], np.int64),
        token_ids=torch.from_numpy(np.concatenate([c.token_ids for _, _, c in used])),
        output_counts=torch.from_numpy(np.concatenate([c.output_counts for _, _, c in used])),
        repetition=repeated([p.repetition_penalty for _, p, _ in used], np.float32),
        frequency=repeated([p.frequency_penalty for _, p, _ in used], np.float32),
        presence=repeated([p.presence_penalty for _, p, _ in used], np.float32),
    )


def _random(states: Sequence[SequenceState], vocab_size: int) -> RandomRows | None:
    rows = [row for row, state in enumerate(states) if not state.request.sampling_params.greedy]
    if not rows:
        return None
    drawing = [states[row] for row in rows]
    params = [state.request.sampling_params for state in drawing]
    top_k = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
    uses_top_p, uses_min_p = any(p.top_p < 1 for p in params), any(p.min_p > 0 for p in params)
    return RandomRows(
        rows=None if len(rows) == len(states) else torch.tensor(rows, dtype=torch.int64),
        keys=[(state.request.seed, len(state.token_ids)) for state in drawing],
        temperature=_column(params, lambda p: p.temperature),
        min_p=_column(params, lambda p: p.min_p) if uses_min_p else None,
        top_k=torch.tensor(top_k) if min(top_k) < vocab_size else None,
        top_p=_column(params, lambda p: p.top_p).squeeze(1) if uses_top_p else None,
    )
