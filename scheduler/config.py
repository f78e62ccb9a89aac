"""The values the scheduler needs; the engine derives them from its own configuration."""

from dataclasses import dataclass
from typing import Literal

from halimede.errors import ConfigError

SchedulingPolicy = Literal["fcfs", "priority"]


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits and policies of the scheduler.

    num_blocks: KV cache blocks, block 0 included, which is never handed out (padding points at it).
    block_size: tokens per block.
    max_num_batched_tokens: token budget of one step. max_num_seqs: sequences running at once.
    enable_chunked_prefill: False runs a prompt only in a step that has room for all of it.
    policy: "fcfs" in the order of arrival, "priority" by priority (lower first), then arrival.

    Raises ConfigError for a value out of range, and when one sequence could outgrow the KV cache: the
    longest one, alone, must always be able to run to its end.
    """

    num_blocks: int
    block_size: int = 16
    max_model_len: int = 2048
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    policy: SchedulingPolicy = "fcfs"

    def __post_init__(self) -> None:
        for name in ("block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be at least 1")
        if self.policy not in ("fcfs", "priority"):
            raise ConfigError(f"scheduling_policy={self.policy!r} is not one of: fcfs, priority")
        capacity = max(0, self.num_blocks - 1) * self.block_size
        if capacity < self.max_model_len:
            remedy = f"set max_model_len to at most {capacity}, or " if capacity > 1 else ""
            raise ConfigError(
                f"KV cache too small for one sequence: {self.num_blocks} blocks of {self.block_size} tokens, "
                f"one of them reserved, hold {capacity} tokens, but max_model_len={self.max_model_len}; "
                f"{remedy}"
                "raise kv_cache_memory_bytes (or gpu_memory_utilization on a GPU)"
            )
