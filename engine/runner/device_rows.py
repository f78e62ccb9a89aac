"""The rows' state on a GPU: one matrix that stays there, changed word by word, and read by a kernel.

The host sends what is new and which rows a step runs, in one copy; tokens that were sampled go from the
sampler to the rows without it. On a CPU the kernels are interpreted.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from halimede.engine.model_input import AttentionMetadata, ModelInput, OutputRows
from halimede.engine.runner.gpu_sampler import RandomTensors, TritonSampler
from halimede.engine.runner.row_table import DRAWS, NewRow, StepLayout, StepPlan
from halimede.engine.runner.rows import ChooseTokens, RowLimits
from halimede.engine.runner.sampler import Sample
from halimede.engine.runner.sampling_metadata import SamplingMetadata
from halimede.engine.runner.step_queue import Pending
from halimede.engine.runner.upload import upload_words
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
        # Not torch.arange: on the meta device that imports sympy, which takes 0.4 s and more.
        self._one_each = torch.from_numpy(np.arange(limits.max_rows + 1, dtype=np.int32)).to(device)
        self._sampler = TritonSampler(device)
        self._layout: StepLayout | None = None  # what _step says
        self._step = StepArrays(*[self._one_each[:0]] * 5)
        self._decode_inputs: dict[int, ModelInput] = {}

    def prepare(self, plan: StepPlan, padded_rows: int | None = None) -> ModelInput:
        """See Rows.prepare."""
        layout = plan.layout
        num_rows = len(layout.slots)
        self._send(plan)
        self._start(self._step, num_rows, padded_rows or num_rows)
        if padded_rows is not None:
            return self.decode_input(padded_rows)
        return _model_input(
            self._buffers,
            num_rows,
            layout.num_tokens,
            num_outputs=len(layout.sampled),
            max_query_len=layout.max_query_len,
            max_seq_len=plan.max_seq_len,
            num_decode_rows=layout.num_decode_rows,
            outputs=self._outputs(len(layout.sampled)) if plan.leaves_out else None,
        )

    def decode_input(self, num_rows: int) -> ModelInput:
        """What every step of num_rows rows reads that run one token each, whatever their lengths."""
        found = self._decode_inputs.get(num_rows)
        if found is None:
            found = self._decode_inputs[num_rows] = _model_input(
                self._buffers,
                num_rows,
                num_rows,
                num_outputs=num_rows,
                max_query_len=1,
                max_seq_len=self._limits.max_model_len,
                num_decode_rows=num_rows,
            )
        return found

    def clear(self, padded_rows: int) -> None:
        """Make decode_input(padded_rows) a step of rows that stand for nothing."""
        nothing, first = np.zeros(0, dtype=np.int32), np.zeros(1, dtype=np.int32)
        self._start(StepArrays(*upload_words((nothing, first, *[nothing] * 3), self._device)), 0, padded_rows)

    def choose_with(self, plan: StepPlan) -> ChooseTokens:
        """See Rows.choose_with."""
        return partial(self._choose, bool(plan.layout.features & DRAWS))

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

    def _send(self, plan: StepPlan) -> None:
        """Bring what the device does not know there: changes of the rows, and the layout unless it is the
        last step's."""
        layout = plan.layout
        arrays: list[_Ints] = []
        if layout is not self._layout:
            outputs = np.full(len(layout.slots), -1, dtype=np.int32)
            outputs[layout.sampled] = np.arange(len(layout.sampled), dtype=np.int32)
            arrays = [
                layout.slots,
                layout.query_start_loc,
                layout.token_offsets,
                outputs,
                layout.tokens,
            ]
        changed = bool(plan.new_rows or plan.new_blocks)
        if changed:
            arrays += self._changes(plan)
        sent = upload_words(arrays, self._device)
        if changed:
            update_rows(self._rows, *sent[-2:])
        if layout is not self._layout:
            self._layout, self._step = layout, StepArrays(*sent[:5])

    def _start(self, step: StepArrays, num_rows: int, padded_rows: int) -> None:
        step_inputs(
            self._rows,
            step,
            self._buffers,
            num_rows=num_rows,
            padded_rows=padded_rows,
            block_size=self._limits.block_size,
        )

    def _outputs(self, count: int) -> OutputRows:
        rows = self._buffers.output_rows[:count]
        tables = self._buffers.block_tables
        return OutputRows(
            tables.index_select(0, rows),
            self._one_each[: count + 1],
            self._buffers.seq_lens.index_select(0, rows),
        )

    def _changes(self, plan: StepPlan) -> list[_Ints]:
        """Words of the matrix and what is written there; each word once: of a slot that two sequences had
        since the last step only the later one is in the plan."""
        width = self._rows.shape[1]
        words: list[int] = []
        values: list[int] = []
        for row in plan.new_rows:
            words += range(row.slot * width, row.slot * width + HEADER)
            values += _header(row).tolist()
        for slot, at, block_ids in plan.new_blocks:
            first = slot * width + HEADER + at
            words += range(first, first + len(block_ids))
            values += block_ids
        return [np.array(words, dtype=np.int32), np.array(values, dtype=np.int32)]


def _header(row: NewRow) -> _Ints:
    header = np.zeros(HEADER, dtype=np.int32)
    floats, parameters = header.view(np.float32), row.parameters
    header[NUM_COMPUTED], header[TOP_K] = row.start, parameters.top_k
    floats[TEMPERATURE], floats[MIN_P] = parameters.temperature, parameters.min_p
    floats[TOP_P] = parameters.top_p
    header[SEED : SEED + 2] = np.array([parameters.seed], dtype=np.int64).view(np.int32)
    return header


def _model_input(
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
