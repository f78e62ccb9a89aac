"""The tensors of one step: what the runner builds and the model reads. T tokens, R rows (sequences).

A leaf: the runner above the models and the attention layer below them both speak it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch


class KVCache(NamedTuple):
    """Keys and values of one layer, each [N blocks, K kv heads, B block_size, D head_dim].

    k_scale, v_scale: of a cache in 8 bits, value = code * scale: float32 (1), or [N, K, B] per token and
    head.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those that are there."""
        return tuple(tensor for tensor in self if tensor is not None)


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where each token's keys and values go and what each row may read.

    slot_mapping (T) int64: block_id * block_size + offset of each token's place in the cache.
    block_tables (R, max_blocks) int32: the rows' blocks in order, padded with block 0.
    query_start_loc (R + 1) int32: row r owns tokens query_start_loc[r] .. query_start_loc[r + 1] - 1.
    seq_lens (R) int32: tokens of the row in the cache once this step's are written.
    num_decode_rows: rows with one token in this step.
    """

    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    max_query_len: int
    max_seq_len: int
    num_decode_rows: int


@dataclass(frozen=True, slots=True)
class OutputRows:
    """The rows whose last token's hidden state a step is run for, seen as rows of one token each.

    Of the last layer nothing else is needed but keys and values. block_tables (S, max_blocks) int32,
    query_start_loc (S + 1) int32, seq_lens (S) int32: as in AttentionMetadata.
    """

    block_tables: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One step of the model.

    input_ids (T) int64, positions (T) int64.
    logits_indices (S) int64: the last token of each of the S <= R rows that sample, in row order.
    outputs: the rows that sample, if only the hidden states of logits_indices are wanted; None: all (T).
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    logits_indices: torch.Tensor
    attn: AttentionMetadata
    outputs: OutputRows | None = None
