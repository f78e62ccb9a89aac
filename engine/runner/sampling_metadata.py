"""What the sampler must know of a step's rows; None where no row uses a feature.

S is the number of rows that sample, V the vocabulary size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from halimede.engine.runner.row_table import DRAWS, FILTERS, RowColumns, StepPlan
from halimede.engine.runner.sequence_state import SequenceState

_Row = tuple[int, SequenceState]


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

    keys (D, 2) int64: seed and position of the new token of each. temperature, min_p: float32 (D, 1).
    top_k (D) int64, V for rows without it; top_p (D) float32, 1 for rows without it.
    """

    rows: torch.Tensor | None
    keys: npt.NDArray[np.int64]
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
    """How the next token of each of the S rows is chosen, but for what the rows that draw need.

    draws, filters: whether any row draws, and whether one draws from part of the vocabulary only.
    forbidden: (row, mask (V) bool) of rows with allowed_token_ids.
    banned: (rows, token ids), int64 pairs of equal length: bad words, and stop tokens before min_tokens.
    bias: (rows, token ids, float32 values).
    wanted: the rows that report log-probabilities; num_logprobs: for each of them, how many of the most
        probable tokens to report besides the sampled one (-1: all of them).
    """

    draws: bool
    filters: bool
    forbidden: tuple[tuple[int, torch.Tensor], ...]
    banned: tuple[torch.Tensor, torch.Tensor] | None
    bias: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    penalties: Penalties | None
    wanted: tuple[int, ...]
    num_logprobs: tuple[int, ...]

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
        return self.adjusts_logits or self.draws


def build_sampling_metadata(plan: StepPlan, *, vocab_size: int) -> SamplingMetadata:
    """The SamplingMetadata of a step's rows as their sequences are now, tensors on the CPU."""
    layout = plan.layout
    if not layout.adjusted and not layout.reporting:
        return _plain(bool(layout.features & DRAWS), bool(layout.features & FILTERS))
    adjusted = [(row, layout.states[row]) for row in layout.adjusted]
    num_tokens = plan.seq_lens[layout.sampled].tolist() if adjusted else []
    params = [layout.states[row].request.sampling_params for row in layout.reporting]
    return SamplingMetadata(
        draws=bool(layout.features & DRAWS),
        filters=bool(layout.features & FILTERS),
        forbidden=tuple((row, s.forbidden) for row, s in adjusted if s.forbidden is not None),
        banned=_banned(adjusted, num_tokens, vocab_size),
        bias=_bias(adjusted, vocab_size),
        penalties=_penalties(adjusted),
        wanted=layout.reporting,
        num_logprobs=tuple([p.logprobs for p in params if p.logprobs is not None]),
    )


@cache
def _plain(draws: bool, filters: bool) -> SamplingMetadata:
    """Of rows that ask for nothing else."""
    return SamplingMetadata(draws, filters, (), None, None, None, (), ())


def random_rows(plan: StepPlan, columns: RowColumns, vocab_size: int) -> RandomRows | None:
    """The RandomRows of a step on the CPU; None if no row draws."""
    layout = plan.layout
    if not layout.features & DRAWS:
        return None
    slots = layout.sampled_slots
    rows = np.flatnonzero(columns.temperature[slots])
    slots = slots[rows]
    keys = np.stack([columns.seed[slots], plan.seq_lens[layout.sampled][rows].astype(np.int64)], axis=1)
    min_p, top_k, top_p = columns.min_p[slots], columns.top_k[slots], columns.top_p[slots]
    return RandomRows(
        rows=None if len(rows) == len(layout.sampled) else torch.from_numpy(rows),
        keys=keys,
        temperature=torch.from_numpy(columns.temperature[slots, None]),
        min_p=torch.from_numpy(min_p[:, None]) if (min_p > 0).any() else None,
        top_k=torch.from_numpy(top_k.astype(np.int64)) if (top_k < vocab_size).any() else None,
        top_p=torch.from_numpy(top_p) if (top_p < 1).any() else None,
    )


def _banned(
    states: Sequence[_Row], num_tokens: Sequence[int], vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    pairs = [
        (row, token)
        for row, state in states
        for token in state.banned_token_ids(num_tokens[row])
        if token < vocab_size
    ]
    if not pairs:
        return None
    rows, tokens = torch.tensor(pairs, dtype=torch.int64).unbind(1)
    return rows, tokens


def _bias(states: Iterable[_Row], vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    entries = [
        (row, token, value)
        for row, state in states
        for token, value in (state.request.sampling_params.logit_bias or {}).items()
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


def _penalties(states: Iterable[_Row]) -> Penalties | None:
    used = [(row, s.request.sampling_params, s.counts) for row, s in states if s.counts is not None]
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
