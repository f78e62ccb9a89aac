"""The rows' state on a CPU, in NumPy arrays, and how torch's operations want a step."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from halimede.engine.model_input import AttentionMetadata, ModelInput, OutputRows
from halimede.engine.runner.logprobs import token_logprobs
from halimede.engine.runner.row_table import RowColumns, StepLayout, StepPlan
from halimede.engine.runner.rows import ChooseTokens, RowLimits
from halimede.engine.runner.sampler import Sample, TorchSampler
from halimede.engine.runner.sampling_metadata import SamplingMetadata, random_rows
from halimede.engine.runner.step_queue import Pending
from halimede.scheduler.output import TokenLogprobs


class HostRows:
    """Rows on the CPU. columns: the table's."""

    def __init__(self, columns: RowColumns, limits: RowLimits, vocab_size: int) -> None:
        self._columns = columns
        self._block_size = limits.block_size
        self._vocab_size = vocab_size
        shape = limits.max_rows, limits.max_blocks
        self._tables: npt.NDArray[np.int32] = np.zeros(shape, dtype=np.int32)
        self._last_tokens: npt.NDArray[np.int64] = np.zeros(limits.max_rows, dtype=np.int64)
        self._sampler = TorchSampler()

    def prepare(self, plan: StepPlan, padded_rows: int | None = None) -> ModelInput:
        """See Rows.prepare."""
        assert padded_rows is None, "a CPU has no use for padding"
        self._apply(plan)
        layout, sampled = plan.layout, plan.layout.sampled
        query_lens, starts = layout.query_lens.astype(np.int64), plan.starts.astype(np.int64)
        num_tokens = layout.num_tokens
        row_of = np.repeat(np.arange(len(query_lens)), query_lens)
        positions = np.arange(num_tokens) - np.repeat(layout.query_start_loc[:-1] - starts, query_lens)
        tables = self._block_tables(plan)
        blocks, offsets = np.divmod(positions, self._block_size)
        slots = tables[row_of, blocks].astype(np.int64) * self._block_size + offsets
        return ModelInput(
            input_ids=_tensor(self._input_ids(layout, num_tokens)),
            positions=_tensor(positions),
            logits_indices=_tensor(layout.query_start_loc[1:][sampled].astype(np.int64) - 1),
            attn=AttentionMetadata(
                slot_mapping=_tensor(slots),
                block_tables=_tensor(tables),
                query_start_loc=_tensor(layout.query_start_loc),
                seq_lens=_tensor(plan.seq_lens),
                max_query_len=layout.max_query_len,
                max_seq_len=plan.max_seq_len,
                num_decode_rows=layout.num_decode_rows,
            ),
            outputs=_output_rows(tables, plan) if plan.leaves_out else None,
        )

    def choose_with(self, plan: StepPlan) -> ChooseTokens:
        """See Rows.choose_with."""
        random = random_rows(plan, self._columns, self._vocab_size)
        slots = plan.layout.sampled_slots

        def choose(logits: torch.Tensor, metadata: SamplingMetadata) -> Sample:
            sample = self._sampler.launch(logits, metadata, random)
            # One that failed has no token, and what it runs until that is noticed must be one all the same.
            self._last_tokens[slots] = sample.tokens.numpy().clip(min=0)
            return sample

        return choose

    def prompt_logprobs(
        self, logits: torch.Tensor, token_ids: Sequence[int], num_logprobs: Sequence[int]
    ) -> Pending[list[TokenLogprobs]]:
        """See Rows.prompt_logprobs."""
        entries = token_logprobs(logits.float(), torch.tensor(token_ids, dtype=torch.int64), num_logprobs)
        return Pending((), lambda copies: entries)

    def _apply(self, plan: StepPlan) -> None:
        for slot, _, _ in plan.new_rows:
            self._tables[slot] = 0
        for slot, at, block_ids in plan.new_blocks:
            self._tables[slot, at : at + len(block_ids)] = block_ids

    def _block_tables(self, plan: StepPlan) -> npt.NDArray[np.int32]:
        """(R, max_blocks) int32, only as wide as the longest row needs, padded with the null block."""
        needed = -(-plan.seq_lens // self._block_size)
        assert (plan.num_blocks >= needed).all(), "a scheduled sequence has too few blocks for its tokens"
        width = int(needed.max())
        tables: npt.NDArray[np.int32] = self._tables[plan.layout.slots, :width]
        if (plan.num_blocks > needed).any():  # nothing is in those blocks yet
            tables[np.arange(width) >= needed[:, None]] = 0
        return tables

    def _input_ids(self, layout: StepLayout, num_tokens: int) -> npt.NDArray[np.int64]:
        known = layout.token_offsets >= 0
        if not known.any():
            return self._last_tokens[layout.slots]
        input_ids = np.empty(num_tokens, dtype=np.int64)
        input_ids[layout.query_start_loc[:-1][~known]] = self._last_tokens[layout.slots[~known]]
        input_ids[np.repeat(known, layout.query_lens)] = layout.tokens
        return input_ids


def _output_rows(tables: npt.NDArray[np.int32], plan: StepPlan) -> OutputRows:
    return OutputRows(
        block_tables=_tensor(tables[plan.layout.sampled]),
        query_start_loc=torch.arange(len(plan.layout.sampled) + 1, dtype=torch.int32),
        seq_lens=_tensor(plan.seq_lens[plan.layout.sampled]),
    )


def _tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(array)
