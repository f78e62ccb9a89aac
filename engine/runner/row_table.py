"""The rows of running sequences, as the host knows them: which slot each has, and what a step is to do.

A sequence has a slot from the step that introduces it to the step that forgets it. What a step needs of all
rows lies in columns by slot, so that a step costs a few gathers, not Python per row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from halimede.engine.runner.sequence_state import SequenceState
from halimede.scheduler.output import NewSequence, SchedulerOutput

_Ints = npt.NDArray[np.int32]
_Longs = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float32]

# What a row asks of the sampler.
DRAWS = 1  # it draws, others take the largest logit
FILTERS = 2  # min_p, top_k or top_p
LOGPROBS = 4
ADJUSTS = 8  # anything that changes its logits before
PROMPT_LOGPROBS = 16
_SIGNED_64 = 1 << 63


class RowParameters(NamedTuple):
    """How a row draws. temperature: 0 for the largest logit. top_k: V for no limit. seed: signed, 64 bits."""

    temperature: float
    min_p: float
    top_p: float
    top_k: int
    seed: int


class NewRow(NamedTuple):
    """A slot that a sequence takes over. start: its tokens that are in the cache already."""

    slot: int
    start: int
    parameters: RowParameters


class NewBlocks(NamedTuple):
    """Blocks of a row's table from place `at` on."""

    slot: int
    at: int
    block_ids: tuple[int, ...]


class PromptChunk(NamedTuple):
    """Prompt tokens that a step predicts for a sequence that wants to know how likely they were.

    first: the token of the step that predicts the first of them. num_logprobs: see SamplingParams.
    """

    seq_id: int
    first: int
    token_ids: list[int]
    num_logprobs: int


@dataclass(frozen=True, slots=True)
class StepLayout:
    """What is the same in every step of the same R rows with the same numbers of tokens, T in all; S sample.

    slots, query_lens (R): a row's slot and the tokens it runs. query_start_loc (R + 1).
    tokens (P): ids of tokens that the host knows; token_offsets (R): where a row's begin in there, -1 for a
    row of one token, the one that it sampled last.
    sampled (S): the rows that sample; sampled_slots, sampled_seq_ids, states: theirs.
    features: what of DRAWS, FILTERS, ... any of those asks for; adjusted, reporting: the places among them of
    those that ask for ADJUSTS and LOGPROBS. followed: those whose tokens the host must know.
    repeats: whether the step after it may be just like it: all rows go on with the token that they sampled.
    """

    seq_ids: tuple[int, ...]
    slots: _Ints
    query_lens: _Ints
    query_start_loc: _Ints
    tokens: _Ints
    token_offsets: _Ints
    sampled: _Longs
    sampled_slots: _Ints
    sampled_seq_ids: Sequence[int]
    states: tuple[SequenceState, ...]
    features: int
    adjusted: tuple[int, ...]
    reporting: tuple[int, ...]
    followed: tuple[SequenceState, ...]
    repeats: bool

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.query_start_loc[-1])

    @property
    def decodes(self) -> bool:
        """Whether every row runs one token and samples."""
        return self.num_tokens == len(self.slots) == len(self.sampled)

    @property
    def max_query_len(self) -> int:
        """Tokens of the row that runs most."""
        return int(self.query_lens.max())

    @property
    def num_decode_rows(self) -> int:
        """Rows of one token."""
        return int((self.query_lens == 1).sum())


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step in numbers. The layout is the last step's own where nothing of it has changed.

    starts, seq_lens (R): a row's tokens before and after the step. num_blocks (R): blocks of its table.
    prompts: the prompt log-probabilities that are asked for.
    new_rows, new_blocks: what changes before the step, in this order.
    """

    layout: StepLayout
    starts: _Ints
    seq_lens: _Ints
    num_blocks: _Ints
    prompts: tuple[PromptChunk, ...]
    new_rows: tuple[NewRow, ...]
    new_blocks: tuple[NewBlocks, ...]

    @property
    def max_seq_len(self) -> int:
        """Tokens of the longest row, after the step."""
        return int(self.seq_lens.max())

    @property
    def leaves_out(self) -> bool:
        """Whether the last hidden state of some tokens is of no use."""
        return not self.prompts and self.layout.num_tokens > len(self.layout.sampled)


class RowColumns:
    """RowParameters and what a row asks of the sampler, by slot (M)."""

    def __init__(self, max_rows: int) -> None:
        self.temperature: _Floats = np.zeros(max_rows, dtype=np.float32)
        self.min_p: _Floats = np.zeros(max_rows, dtype=np.float32)
        self.top_p: _Floats = np.ones(max_rows, dtype=np.float32)
        self.top_k: _Ints = np.zeros(max_rows, dtype=np.int32)
        self.seed: _Longs = np.zeros(max_rows, dtype=np.int64)
        self.features: npt.NDArray[np.uint8] = np.zeros(max_rows, dtype=np.uint8)

    def fill(self, slot: int, parameters: RowParameters, features: int) -> None:
        """Enter a sequence."""
        self.temperature[slot], self.min_p[slot], self.top_p[slot] = parameters[:3]
        self.top_k[slot], self.seed[slot] = parameters[3:]
        self.features[slot] = features


def _parameters(state: SequenceState, vocab_size: int) -> RowParameters:
    params = state.request.sampling_params
    return RowParameters(
        0.0 if params.greedy else params.temperature,
        params.min_p,
        params.top_p,
        min(params.top_k, vocab_size) if params.top_k > 0 else vocab_size,
        (state.request.seed + _SIGNED_64) % (2 * _SIGNED_64) - _SIGNED_64,
    )


def _features(state: SequenceState, parameters: RowParameters, vocab_size: int) -> int:
    params, features = state.request.sampling_params, 0
    if not params.greedy:
        filters = parameters.top_k < vocab_size or params.top_p < 1 or params.min_p > 0
        features = DRAWS | FILTERS if filters else DRAWS
    if params.logprobs is not None:
        features |= LOGPROBS
    if params.prompt_logprobs is not None:
        features |= PROMPT_LOGPROBS
    adjusts = (
        state.counts is not None
        or params.logit_bias
        or params.allowed_token_ids is not None
        or params.min_tokens
    )
    return features | ADJUSTS if adjusts or state.request.bad_words_token_ids else features


class RowTable:
    """Slots 0 .. max_rows - 1 and who has them."""

    def __init__(self, max_rows: int, vocab_size: int) -> None:
        self.columns = RowColumns(max_rows)
        self._vocab_size = vocab_size
        self._slots: dict[int, int] = {}
        self._free = list(range(max_rows - 1, -1, -1))
        self._states: list[SequenceState | None] = [None] * max_rows
        self._num_known = np.zeros(max_rows, dtype=np.int32)
        self._num_blocks = np.zeros(max_rows, dtype=np.int32)
        self._num_computed = np.zeros(max_rows, dtype=np.int32)
        self._last: _Last | None = None

    def state(self, seq_id: int) -> SequenceState | None:
        """A sequence's state, None if it is not known (any more)."""
        slot = self._slots.get(seq_id)
        return None if slot is None else self._states[slot]

    def plan(self, output: SchedulerOutput) -> StepPlan | None:
        """Forget who ended, take in who is new, and say what the step does; None if it runs nothing."""
        for seq_id in (*output.finished_seq_ids, *output.preempted_seq_ids):
            self._forget(seq_id)
        if not output.scheduled:
            return None
        seq_ids, counts, begins, blocks, samples, news = zip(*output.scheduled, strict=True)
        new_rows: tuple[NewRow, ...] = ()
        if any(news):
            new_rows = tuple(
                self._introduce(seq_id, start, new)
                for seq_id, start, new in zip(seq_ids, begins, news, strict=True)
                if new is not None
            )
        last, key = self._last, (seq_ids, counts, samples)
        prompts: tuple[PromptChunk, ...] = ()
        if last is not None and not new_rows and last.plan.layout.repeats and last.key == key:
            layout = last.plan.layout
            starts = last.plan.seq_lens
        else:
            slots = np.fromiter(map(self._slots.__getitem__, seq_ids), dtype=np.int32, count=len(seq_ids))
            starts = self._num_computed[slots]
            layout = self._lay_out(seq_ids, slots, np.array(counts, dtype=np.int32), starts, samples)
            prompts = tuple(self._prompts(layout, starts))
        assert begins[0] in (None, starts[0]), "a row goes on where it was"
        seq_lens = starts + layout.query_lens
        self._num_computed[layout.slots] = seq_lens
        plan = StepPlan(
            layout=layout,
            starts=starts,
            seq_lens=seq_lens,
            new_blocks=tuple(self._add_blocks(layout.slots, blocks)) if any(blocks) else (),
            num_blocks=self._num_blocks[layout.slots],
            prompts=prompts,
            new_rows=new_rows,
        )
        self._last = _Last(key, plan)
        return plan

    def _lay_out(
        self,
        seq_ids: tuple[int, ...],
        slots: _Ints,
        query_lens: _Ints,
        starts: _Ints,
        samples: Sequence[bool],
    ) -> StepLayout:
        query_start_loc = np.zeros(len(seq_ids) + 1, dtype=np.int32)
        np.cumsum(query_lens, out=query_start_loc[1:])
        tokens, token_offsets = self._known_tokens(slots, starts, query_lens)
        sampled = np.flatnonzero(samples)
        sampled_slots = slots[sampled]
        features = self.columns.features[sampled_slots]
        states = [self._states[slot] for slot in sampled_slots.tolist()]
        known = tuple(state for state in states if state is not None)
        return StepLayout(
            seq_ids=seq_ids,
            slots=slots,
            query_lens=query_lens,
            query_start_loc=query_start_loc,
            tokens=tokens,
            token_offsets=token_offsets,
            sampled=sampled,
            sampled_slots=sampled_slots,
            sampled_seq_ids=[seq_ids[row] for row in sampled.tolist()],
            states=known,
            features=int(np.bitwise_or.reduce(features, initial=0)),
            adjusted=tuple(np.flatnonzero(features & ADJUSTS).tolist()),
            reporting=tuple(np.flatnonzero(features & LOGPROBS).tolist()),
            followed=tuple(state for state in known if state.follows_tokens),
            repeats=not len(tokens) and len(sampled) == len(seq_ids),
        )

    def _forget(self, seq_id: int) -> None:
        slot = self._slots.pop(seq_id, None)
        if slot is not None:
            self._states[slot] = None
            self._free.append(slot)

    def _introduce(self, seq_id: int, start: int, new: NewSequence) -> NewRow:
        self._forget(seq_id)
        slot = self._free.pop()
        state = SequenceState(seq_id, new, vocab_size=self._vocab_size)
        self._slots[seq_id], self._states[slot] = slot, state
        self._num_known[slot], self._num_blocks[slot] = len(state.tokens), 0
        self._num_computed[slot] = start
        parameters = _parameters(state, self._vocab_size)
        self.columns.fill(slot, parameters, _features(state, parameters, self._vocab_size))
        return NewRow(slot, start, parameters)

    def _add_blocks(self, slots: _Ints, blocks: Sequence[tuple[int, ...]]) -> Iterator[NewBlocks]:
        rows = list(compress(range(len(blocks)), blocks))
        for slot, row in zip(slots[rows].tolist(), rows, strict=True):
            at, block_ids = int(self._num_blocks[slot]), blocks[row]
            self._num_blocks[slot] = at + len(block_ids)
            yield NewBlocks(slot, at, block_ids)

    def _known_tokens(self, slots: _Ints, starts: _Ints, query_lens: _Ints) -> tuple[_Ints, _Ints]:
        """tokens and token_offsets of a StepPlan."""
        offsets = np.full(len(slots), -1, dtype=np.int32)
        pieces: list[_Ints] = []
        size = 0
        for row in np.flatnonzero(starts < self._num_known[slots]).tolist():
            state, start, count = self._states[slots[row]], int(starts[row]), int(query_lens[row])
            assert state is not None, "a row belongs to a sequence"
            pieces.append(state.tokens[start : start + count])
            assert len(pieces[-1]) == count, "a step runs more tokens than are known"
            offsets[row] = size
            size += count
        return np.concatenate(pieces) if pieces else offsets[:0], offsets

    def _prompts(self, layout: StepLayout, starts: _Ints) -> Iterator[PromptChunk]:
        for row in np.flatnonzero(self.columns.features[layout.slots] & PROMPT_LOGPROBS).tolist():
            state = self._states[layout.slots[row]]
            assert state is not None, "a row belongs to a sequence"
            start, count = int(starts[row]) + 1, int(layout.query_lens[row])
            targets = state.token_ids[start : min(start + count, state.num_prompt_tokens)]
            num_logprobs = state.request.sampling_params.prompt_logprobs
            if targets and num_logprobs is not None:
                yield PromptChunk(state.seq_id, int(layout.query_start_loc[row]), targets, num_logprobs)


class _Last(NamedTuple):
    """The step before, and what must be equal for the next one to be like it."""

    key: tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]
    plan: StepPlan
