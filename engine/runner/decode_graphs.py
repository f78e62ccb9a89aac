"""GPU graphs of decode steps: every launch of a step recorded once for a number of rows, replayed as one.

A step of R rows that run one token each replays the graph of the next larger size; rows that are not there
stand for nothing. Graphs read lengths and block tables from the device, so one graph serves every context.
"""

import logging
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from halimede.engine.runner.row_table import StepPlan

logger = logging.getLogger(__name__)

Replay = Callable[[], torch.Tensor]
Work = Callable[[int], torch.Tensor]


class Recorder(Protocol):
    """A device that records what is launched on it."""

    def record(self, work: Callable[[], torch.Tensor]) -> Replay:
        """Run the work once, then record it. The replay writes the tensor that the recorded run returned.

        torch.OutOfMemoryError if the device's memory does not hold it.
        """
        ...

    def release(self) -> None:
        """Give back the memory of what could not be recorded."""
        ...


class CudaRecorder:
    """CUDA and HIP graphs, which share one pool of memory: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], torch.Tensor]) -> Replay:
        """See Recorder.record."""
        # Kernels are loaded, libraries find their workspaces: what must not happen while recording.
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls may not disturb it: an application has threads of its own.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            output = work()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay

    def release(self) -> None:
        """See Recorder.release."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


class DecodeGraphs:
    """Graphs by number of rows.

    clear: makes the inputs of a step of so many rows harmless. work: runs such a step and returns its logits;
    what it reads must be in the same place each time. sizes: those to record; see capture_sizes. lazily: each
    only when steps of its size come.
    """

    def __init__(
        self,
        recorder: Recorder,
        clear: Callable[[int], None],
        work: Work,
        sizes: Iterable[int],
        *,
        lazily: bool = False,
    ) -> None:
        self._recorder = recorder
        self._clear = clear
        self._work = work
        self._sizes = sorted(sizes)
        self._lazily = lazily
        self._seen: set[int] = set()
        self._graphs: dict[int, Replay] = {}

    @property
    def sizes(self) -> list[int]:
        """Those that there is a graph for."""
        return sorted(self._graphs)

    def record_all(self) -> None:
        """Record every size, the largest first, whose memory the others then use too.

        A size that the memory does not hold is left out, with a warning: such steps are run launch by launch.
        """
        if self._lazily:
            return
        start = time.monotonic()
        for size in self._sizes[::-1]:
            self.record(size)
        seconds = time.monotonic() - start
        logger.info("graphs for steps of %s rows recorded in %.1f s", self.sizes or "no", seconds)

    @torch.inference_mode()
    def record(self, size: int) -> bool:
        """Record one size. False, and a warning, if the memory does not hold it."""
        try:
            self._clear(size)
            self._graphs[size] = self._recorder.record(lambda: self._work(size))
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            self._recorder.release()
            self._sizes.remove(size)
            logger.warning(
                "no memory for a graph of %d rows: steps of that size run without one, or with the graph of "
                "a larger size (%s); lower gpu_memory_utilization or max_num_seqs to leave more",
                size,
                str(error).splitlines()[0],
            )
            return False
        return True

    def size_for(self, plan: StepPlan) -> int | None:
        """The size whose graph runs a step; None if none does."""
        if plan.prompts or not plan.layout.decodes:
            return None
        rows = len(plan.layout.slots)
        for size in self._sizes:
            if size >= rows:
                return size if size in self._graphs or self._is_due(size) else None
        return None

    def replay(self, size: int) -> torch.Tensor:
        """The logits (size, V) of the step whose inputs are in place. They are overwritten by the next."""
        return self._graphs[size]()

    def _is_due(self, size: int) -> bool:
        """Record a size that has been met before, if that is done lazily, and whether that succeeded."""
        if not self._lazily:
            return False
        if size not in self._seen:
            self._seen.add(size)
            return False
        return self.record(size)


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Or came of that: the end of a recording that broke off raises an error of its own."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error is not None


def capture_sizes(max_num_seqs: int) -> list[int]:
    """Rows of the graphs up to max_num_seqs: 1, 2, 4, then steps of 8 to 64, of 16 to 256, of 32 beyond."""
    steps = (1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs, 32))
    return [*(size for size in steps if size < max_num_seqs), max_num_seqs]
