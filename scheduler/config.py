"""The values the scheduler needs; the engine derives them from its own configuration."""

from dataclasses import dataclass
from typing import Literal

SchedulingPolicy = Literal["fcfs", "priority"]


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits and policies of the scheduler.

    num_blocks: KV cache blocks, block 0 included, which is never handed out (padding points at it).
    block_size: tokens per block.
    max_num_batched_tokens: token budget of one step. max_num_seqs: sequences running at once.
    enable_chunked_prefill: False runs a prompt only in a step that has room for all of it.
    """

    num_blocks: int
    block_size: int = 16
    max_model_len: int = 2048
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    policy: SchedulingPolicy = "fcfs"
