"""From a scheduled step and the runner's sequences to the tensors the model reads."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from halimede.engine.model_input import AttentionMetadata, ModelInput, OutputRows
from halimede.engine.runner.sequence_state import SequenceState
from halimede.scheduler.output import ScheduledSequence


def build_model_input(
    scheduled: Sequence[ScheduledSequence],
    states: Sequence[SequenceState],
    *,
    block_size: int,
    device: torch.device,
    all_hidden_states: bool = False,
) -> ModelInput:
    """The ModelInput of a step of R >= 1 sequences; states[r] belongs to scheduled[r].

    Each state must already hold the step's new blocks. all_hidden_states: of every token, not only of those
    that are sampled from.
    """
    rows = len(scheduled)
    query_lens = np.fromiter((len(s.token_ids) for s in scheduled), dtype=np.int64, count=rows)
    starts = np.fromiter((s.num_computed_tokens for s in scheduled), dtype=np.int64, count=rows)
    query_start_loc = np.zeros(rows + 1, dtype=np.int64)
    np.cumsum(query_lens, out=query_start_loc[1:])
    num_tokens = int(query_start_loc[-1])
    seq_lens = starts + query_lens

    input_ids = np.fromiter((t for s in scheduled for t in s.token_ids), dtype=np.int64, count=num_tokens)
    row_of = np.repeat(np.arange(rows), query_lens)
    positions = np.arange(num_tokens) - np.repeat(query_start_loc[:-1] - starts, query_lens)
    block_tables = _block_tables(states, seq_lens, block_size)
    slots = (
        block_tables[row_of, positions // block_size].astype(np.int64) * block_size + positions % block_size
    )
    sampled = np.fromiter((s.needs_sample for s in scheduled), dtype=np.bool_, count=rows)
    only_sampled = not all_hidden_states and num_tokens > sampled.sum()
    return ModelInput(
        input_ids=_to_device(input_ids, device),
        positions=_to_device(positions, device),
        logits_indices=_to_device(query_start_loc[1:][sampled] - 1, device),
        attn=AttentionMetadata(
            slot_mapping=_to_device(slots, device),
            block_tables=_to_device(block_tables, device),
            query_start_loc=_to_device(query_start_loc.astype(np.int32), device),
            seq_lens=_to_device(seq_lens.astype(np.int32), device),
            max_query_len=int(query_lens.max()),
            max_seq_len=int(seq_lens.max()),
            num_decode_rows=int((query_lens == 1).sum()),
        ),
        outputs=_output_rows(block_tables[sampled], seq_lens[sampled], device) if only_sampled else None,
    )


def _output_rows(
    block_tables: npt.NDArray[np.int32], seq_lens: npt.NDArray[np.int64], device: torch.device
) -> OutputRows:
    return OutputRows(
        block_tables=_to_device(block_tables, device),
        query_start_loc=_to_device(np.arange(len(seq_lens) + 1, dtype=np.int32), device),
        seq_lens=_to_device(seq_lens.astype(np.int32), device),
    )


def _block_tables(
    states: Sequence[SequenceState], seq_lens: npt.NDArray[np.int64], block_size: int
) -> npt.NDArray[np.int32]:
    """(R, max_blocks) int32, only as wide as the longest row needs, padded with the null block."""
    needed = -(-seq_lens // block_size)
    tables = np.zeros((len(states), int(needed.max())), dtype=np.int32)
    for table, state, count in zip(tables, states, needed, strict=True):
        assert len(state.block_ids) >= count, "a scheduled sequence has too few blocks for its tokens"
        table[:count] = state.block_ids[:count]
    return tables


def _to_device(array: npt.NDArray[np.int64] | npt.NDArray[np.int32], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    # From pinned memory the copy does not wait for the work already queued on the GPU.
    return tensor.pin_memory().to(device, non_blocking=True)
