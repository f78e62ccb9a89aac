"""How many bytes the KV cache may take when the configuration does not say."""

import gc
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from halimede.engine.config import EngineConfig
from halimede.engine.runner.kv_cache import KVCacheSpec
from halimede.engine.runner.model_runner import ModelRunner
from halimede.scheduler.output import NewSequence, ScheduledSequence, SchedulerOutput
from halimede.scheduler.request import Request
from halimede.scheduler.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

_GIB = 1 << 30
_CPU_SHARE = 0.4
_CPU_MOST = 4 * _GIB
_MEMINFO = Path("/proc/meminfo")


def cpu_kv_bytes(meminfo: Path = _MEMINFO) -> int:
    """A CPU's default: 40% of the memory that is available, at most 4 GiB."""
    return min(_CPU_MOST, int(_CPU_SHARE * available_memory(meminfo)))


def available_memory(meminfo: Path = _MEMINFO) -> int:
    """Bytes that can be used without swapping; all physical memory where the system does not tell."""
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class GpuMemory(Protocol):
    """What is to be known of a GPU's memory."""

    def info(self) -> tuple[int, int]:
        """Bytes that are free, those included that this process holds and does not use, and all there are."""
        ...

    def peak(self, run: Callable[[], object]) -> int:
        """Bytes that a call allocates beyond those there were, at its most."""
        ...


class CudaMemory:
    """Of a CUDA or ROCm device, other processes included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def info(self) -> tuple[int, int]:
        """See GpuMemory.info."""
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)

    def peak(self, run: Callable[[], object]) -> int:
        """See GpuMemory.peak."""
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        run()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before


def gpu_kv_bytes(config: EngineConfig, memory: GpuMemory, *, activations: int, graphs: int) -> int:
    """gpu_memory_utilization of the GPU, less what is in use (workspaces too) and what is yet to come."""
    free, total = memory.info()
    rest = int(config.gpu_memory_utilization * total) - (total - free) - activations - graphs
    sizes = (total, total - free, activations, graphs, max(rest, 0))
    logger.info(
        "GPU memory: %.2f GiB, %.2f in use, %.2f for activations, %.2f for graphs, %.2f for the KV cache",
        *(size / _GIB for size in sizes),
    )
    return max(rest, 0)


def activation_bytes(runner: ModelRunner, step: SchedulerOutput, memory: GpuMemory) -> int:
    """Bytes that a runner allocates for a step and gives back. It is run twice: what the first run allocates
    to stay, such as workspaces, is no part of it."""
    runner.execute(step)
    return memory.peak(lambda: runner.execute(step))


def graph_bytes(record: Callable[[int], bool], sizes: Sequence[int], memory: GpuMemory) -> int:
    """Bytes that graphs of these sizes will take, from what the two largest do.

    record: records a size, and says whether that succeeded. The largest one's memory serves the others too,
    which therefore take what the second one does.
    """
    taken: list[int] = []
    for size in sorted(sizes, reverse=True)[:2]:
        before, _ = memory.info()
        if not record(size):
            break
        taken.append(max(0, before - memory.info()[0]))
    return sum(taken[:1]) + sum(taken[1:]) * (len(sizes) - 1)


def largest_step(config: EngineConfig, spec: KVCacheSpec, max_model_len: int) -> SchedulerOutput:
    """A made-up step of max_num_batched_tokens tokens in which all sequences use the costly options.

    As many sequences as may run; the first ones take the tokens, up to max_model_len each, so that there is
    a long prompt as well as single tokens. All blocks are the null block: nothing is written elsewhere.
    """
    rows = min(config.max_num_seqs, config.max_num_batched_tokens)
    spare = config.max_num_batched_tokens - rows
    params = SamplingParams(top_p=0.9, min_p=0.01, repetition_penalty=1.1, logprobs=0, prompt_logprobs=0)
    scheduled = []
    for seq_id in range(rows):
        more = min(spare, max_model_len - 1)
        spare -= more
        tokens = (0,) * (1 + more)
        request = Request(f"memory-{seq_id}", tokens, params, seed=0, arrival_time=0.0)
        scheduled.append(
            ScheduledSequence(
                seq_id=seq_id,
                num_tokens=len(tokens),
                num_computed_tokens=0,
                new_block_ids=(0,) * spec.blocks_for(len(tokens)),
                needs_sample=True,
                new=NewSequence(request, tokens, len(tokens)),
            )
        )
    return SchedulerOutput(step=0, scheduled=tuple(scheduled))
