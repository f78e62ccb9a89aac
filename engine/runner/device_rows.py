"""The rows' state on a GPU: one matrix that stays there, changed word by word, and read by a kernel.

The host sends what is new and which rows a step runs, in one copy; tokens that were sampled go from the
sampler to the rows without it. On a CPU the kernels are interpreted.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from halimede.engine.model_input import AttentionMetadata, ModelInput, OutputRows
from halimede.engine.runner.gpu_sampler import RandomTensors, TritonSampler
from halimede.engine.runner.row_table import DRAWS, NewRow, StepPlan
from halimede.engine.runner.rows import ChooseTokens, RowLimits
from halimede.engine.runner.sampler import Sample
from halimede.engine.runner.sampling_metadata import SamplingMetadata
from halimede.engine.runner.step_queue import Pending
from halimede.engine.runner.upload import upload
from halimede.kernels.gpu.row_state import (
    HEADER,
    MIN_P,
    NUM_COMPUTED,
    SEED,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    commit_tokens,
    update_rows,
)
from halimede.kernels.gpu.step_inputs import StepArrays, StepBuffers, make_step_buffers, step_inputs
from halimede.scheduler.output import TokenLogprobs

_Ints = npt.NDArray[np.int32]
_UNIT = 4  # words: a row of the matrix is a multiple of them long


class DeviceRows:
    """Rows on `device`."""

    def __init__(self, limits: RowLimits, device: torch.device) -> None:
        self._limits = limits
        self._device = device
        width = HEADER + -(-limits.max_blocks // _UNIT) * _UNIT
        self._rows = torch.zeros(limits.max_rows, width, dtype=torch.int32, device=device)
        self._buffers = make_step_buffers(limits.max_tokens, limits.max_rows, width - HEADER, device)
        self._one_each = torch.arange(limits.max_rows + 1, dtype=torch.int32, device=device)
        self._sampler = TritonSampler(device)

    def prepare(self, plan: StepPlan, padded_rows: int | None = None) -> ModelInput:
        """See Rows.prepare."""
        num_rows = len(plan.slots)
        self._write_inputs(plan, padded_rows or num_rows)
        if padded_rows is not None:
            return self.decode_input(padded_rows)
        return model_input(
            self._buffers,
            num_rows,
            plan.num_tokens,
            num_outputs=len(plan.sampled),
            max_query_len=int(plan.query_lens.max()),
            max_seq_len=int(plan.seq_lens.max()),
            num_decode_rows=int((plan.query_lens == 1).sum()),
            outputs=self._outputs(plan),
        )

    def decode_input(self, num_rows: int) -> ModelInput:
        """What every step of num_rows rows reads that run one token each, whatever their lengths."""
        return model_input(
            self._buffers,
            num_rows,
            num_rows,
            num_outputs=num_rows,
            max_query_len=1,
            max_seq_len=self._limits.max_model_len,
            num_decode_rows=num_rows,
        )

    def clear(self, padded_rows: int) -> None:
        """Make decode_input(padded_rows) a step of rows that stand for nothing."""
        nothing = np.zeros(0, dtype=np.int32)
        step = upload(
            {**dict.fromkeys(_STEP, nothing), "query_start_loc": np.zeros(1, dtype=np.int32)}, self._device
        )
        self._start(StepArrays(**step), 0, padded_rows)

    def choose_with(self, plan: StepPlan) -> ChooseTokens:
        """See Rows.choose_with."""
        return partial(self._choose, bool(plan.features & DRAWS))

    def _choose(self, draws: bool, logits: torch.Tensor, metadata: SamplingMetadata) -> Sample:
        buffers, count = self._buffers, len(logits)
        random = None
        if draws:
            random = RandomTensors(
                buffers.temperature[:count],
                buffers.min_p[:count],
                buffers.top_k[:count],
                buffers.top_p[:count],
                buffers.keys[:count],
            )
        sample = self._sampler.launch(logits, metadata, random)
        commit_tokens(sample.tokens, buffers.output_slots, self._rows)
        return sample

    def prompt_logprobs(
        self, logits: torch.Tensor, token_ids: Sequence[int], num_logprobs: Sequence[int]
    ) -> Pending[list[TokenLogprobs]]:
        """See Rows.prompt_logprobs."""
        return self._sampler.launch_logprobs(logits, token_ids, num_logprobs)

    def _write_inputs(self, plan: StepPlan, padded_rows: int) -> None:
        outputs = np.full(len(plan.slots), -1, dtype=np.int32)
        outputs[plan.sampled] = np.arange(len(plan.sampled), dtype=np.int32)
        arrays = {
            "slots": plan.slots,
            "query_start_loc": plan.query_start_loc,
            "token_offsets": plan.token_offsets,
            "outputs": outputs,
            "tokens": plan.tokens,
        }
        if plan.new_rows or plan.new_blocks:
            arrays["words"], arrays["values"] = self._changes(plan)
        sent = upload(arrays, self._device)
        if "words" in sent:
            update_rows(self._rows, sent.pop("words"), sent.pop("values"))
        self._start(StepArrays(**sent), len(plan.slots), padded_rows)

    def _start(self, step: StepArrays, num_rows: int, padded_rows: int) -> None:
        step_inputs(
            self._rows,
            step,
            self._buffers,
            num_rows=num_rows,
            padded_rows=padded_rows,
            block_size=self._limits.block_size,
        )

    def _outputs(self, plan: StepPlan) -> OutputRows | None:
        count = len(plan.sampled)
        if plan.prompts or plan.num_tokens == count:
            return None
        rows = self._buffers.output_rows[:count]
        tables = self._buffers.block_tables
        return OutputRows(
            tables.index_select(0, rows),
            self._one_each[: count + 1],
            self._buffers.seq_lens.index_select(0, rows),
        )

    def _changes(self, plan: StepPlan) -> tuple[_Ints, _Ints]:
        """Words of the matrix and what is written there; each word once: of a slot that two sequences had
        since the last step only the later one is in the plan."""
        width = self._rows.shape[1]
        words: list[_Ints] = []
        values: list[Any] = []
        for row in plan.new_rows:
            words.append(np.arange(row.slot * width, row.slot * width + HEADER, dtype=np.int32))
            values.append(_header(row))
        for slot, at, block_ids in plan.new_blocks:
            first = slot * width + HEADER + at
            words.append(np.arange(first, first + len(block_ids), dtype=np.int32))
            values.append(block_ids)
        return np.concatenate(words), np.concatenate(values, dtype=np.int32)


def _header(row: NewRow) -> _Ints:
    header = np.zeros(HEADER, dtype=np.int32)
    floats, parameters = header.view(np.float32), row.parameters
    header[NUM_COMPUTED], header[TOP_K] = row.start, parameters.top_k
    floats[TEMPERATURE], floats[MIN_P] = parameters.temperature, parameters.min_p
    floats[TOP_P] = parameters.top_p
    header[SEED : SEED + 2] = np.array([parameters.seed], dtype=np.int64).view(np.int32)
    return header


_STEP = ("slots", "query_start_loc", "token_offsets", "outputs", "tokens")


def model_input(
    buffers: StepBuffers,
    num_rows: int,
    num_tokens: int,
    *,
    num_outputs: int,
    max_query_len: int,
    max_seq_len: int,
    num_decode_rows: int,
    outputs: OutputRows | None = None,
) -> ModelInput:
    """The buffers of a step as a model's input."""
    return ModelInput(
        input_ids=buffers.input_ids[:num_tokens],
        positions=buffers.positions[:num_tokens],
        logits_indices=buffers.logits_indices[:num_outputs],
        attn=AttentionMetadata(
            slot_mapping=buffers.slot_mapping[:num_tokens],
            block_tables=buffers.block_tables[:num_rows],
            query_start_loc=buffers.query_start_loc[: num_rows + 1],
            seq_lens=buffers.seq_lens[:num_rows],
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            num_decode_rows=num_decode_rows,
        ),
        outputs=outputs,
    )
