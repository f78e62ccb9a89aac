"""Times things that do the same in turns, each as a graph of many calls: a wandering clock hits all alike."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_ROUNDS = 9
_GRAPH_US = 700.0  # of calls in a graph: hundreds of short ones, so that its start does not count
_MOST_CALLS = 256
_SLOW_US = 3000.0  # of a call launch by launch: not worth repeating, and its graph would be huge

Call = Callable[[], Any]


@dataclass(frozen=True)
class Recording:
    """replay: starts so many calls."""

    replay: Call
    num_calls: int


def record(calls: Sequence[Call], device: torch.device, *, least_us: float) -> Recording:
    """A graph of the calls one after the other, as often as it takes to be worth timing.

    calls: alike, with weights of their own. least_us: that one of them takes at least. What it raises comes
    from the calls, or from what cannot be in a graph.
    """
    if device.type != "cuda":
        return Recording(_all(calls), len(calls))
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    # Kernels are loaded and libraries find their workspaces here, which must not happen while recording.
    with torch.cuda.stream(stream):
        calls[0]()
        stream.synchronize()
        start = time.perf_counter()
        calls[-1]()
        stream.synchronize()
        alone_us = (time.perf_counter() - start) * 1e6
    wanted = 1 if alone_us > _SLOW_US else _GRAPH_US / max(1.0, least_us)
    repeats = max(1, round(min(_MOST_CALLS, wanted) / len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        _all(list(calls) * repeats)()
    torch.cuda.synchronize(device)
    return Recording(graph.replay, len(calls) * repeats)


def _all(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


def median_us(recordings: Mapping[str, Recording], device: torch.device) -> dict[str, float]:
    """Microseconds of one call of each: medians over rounds in which each has its turn."""
    if device.type != "cuda":
        return {name: _cpu_us(recording) for name, recording in recordings.items()}
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in recordings}
    # Nothing waits in between, so that the GPU finds the next graph in its queue: the host does not count.
    for turn in range(_ROUNDS + 1):
        for name, recording in recordings.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            recording.replay()
            end.record()
            if turn:  # the first uploads the graphs
                marks[name].append((start, end))
    torch.cuda.synchronize(device)
    return {
        name: statistics.median(start.elapsed_time(end) for start, end in marks[name])
        * 1e3
        / recordings[name].num_calls
        for name in recordings
    }


def _cpu_us(recording: Recording) -> float:
    start = time.perf_counter()
    recording.replay()
    return (time.perf_counter() - start) * 1e6 / recording.num_calls


@contextmanager
def little_garbage() -> Iterator[None]:
    """What is there now is not looked at again: torch may collect before each graph, 0.1 s at a time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
