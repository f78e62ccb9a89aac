"""Steps of a model as the runner may give them to it, on the meta device: every kind, no contents."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from halimede.engine.model_input import AttentionMetadata, ModelInput, OutputRows
from halimede.engine.runner.row_table import RowTable, StepPlan
from halimede.scheduler.output import NewSequence, ScheduledSequence, SchedulerOutput
from halimede.scheduler.request import Request
from halimede.scheduler.sampling_params import SamplingParams

_META = torch.device("meta")


def model_steps(
    max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, sizes: Sequence[int]
) -> Iterator[ModelInput]:
    """The smallest and the largest steps, and those of the `sizes` (numbers of tokens) that there can be:
    rows that decode, prompts, both, each with all hidden states and with those of the outputs only.
    """
    rows = {n for n in (1, max_num_seqs, *sizes) if n <= max_num_seqs}
    for count in sorted(rows):
        yield _step(tokens=count, rows=count, decoding=count, max_model_len=max_model_len)
    for tokens in sorted(
        {n for n in (2, max_num_batched_tokens, *sizes) if 2 <= n <= max_num_batched_tokens}
    ):
        for decoding in (0, 1):
            step = _step(tokens=tokens, rows=1 + decoding, decoding=decoding, max_model_len=max_model_len)
            yield step
            yield replace(step, outputs=_outputs(1 + decoding))


def _step(*, tokens: int, rows: int, decoding: int, max_model_len: int) -> ModelInput:
    longest = 1 if decoding == rows else max(2, min(max_model_len, tokens - decoding))
    return ModelInput(
        input_ids=_integers(tokens, dtype=torch.int64),
        positions=_integers(tokens, dtype=torch.int64),
        logits_indices=_integers(rows, dtype=torch.int64),
        attn=AttentionMetadata(
            slot_mapping=_integers(tokens, dtype=torch.int64),
            block_tables=_integers(rows, 1),
            query_start_loc=_integers(rows + 1),
            seq_lens=_integers(rows),
            max_query_len=longest,
            max_seq_len=longest,
            num_decode_rows=decoding,
        ),
    )


def _outputs(rows: int) -> OutputRows:
    return OutputRows(_integers(rows, 1), _integers(rows + 1), _integers(rows))


def _integers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=_META)


# Of the sampling parameters and of the request.
_CHANGES: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({}, {}),
    ({"logit_bias": {0: 1.0}}, {}),
    ({"repetition_penalty": 1.1}, {}),
    ({"allowed_token_ids": [0]}, {}),
    ({}, {"bad_words_token_ids": ((0,),)}),
)
_DRAWS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.9},
)


def sampling_plans(vocab_size: int, logprob_counts: Sequence[int]) -> Iterator[StepPlan]:
    """A step for every way to choose a token, and for log-probabilities of `logprob_counts` tokens, asked for
    by every row and by some."""
    for params, fields in _CHANGES:
        for draw in _DRAWS:
            yield _plan([SamplingParams(**params, **draw)], vocab_size, **fields)
    for count in logprob_counts:
        asking = SamplingParams(temperature=0.0, logprobs=count)
        yield _plan([asking], vocab_size)
        yield _plan([asking, SamplingParams(temperature=0.0)], vocab_size)


def _plan(params: Sequence[SamplingParams], vocab_size: int, **fields: Any) -> StepPlan:
    """A step of a prompt of one token for each of the params."""
    scheduled = [
        ScheduledSequence(
            row,
            num_tokens=1,
            num_computed_tokens=0,
            new_block_ids=(1,),
            needs_sample=True,
            new=NewSequence(Request(f"warmup-{row}", (0,), p, seed=0, arrival_time=0.0, **fields), (0,), 1),
        )
        for row, p in enumerate(params)
    ]
    plan = RowTable(len(params), vocab_size).plan(SchedulerOutput(0, tuple(scheduled)))
    assert plan is not None, "a step runs something"
    return plan
