"""What a config of a kernel is worth for one shape: whether its result is right, and how long it takes.

Both are found by calling the launcher, which is made to choose the config (tuning.overriding).
"""

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from halimede.errors import KernelError
from halimede.kernels.device_kernels import device_kernels
from halimede.kernels.launch import Launch, intercepting
from halimede.kernels.library import current_library
from halimede.kernels.spec import Case, KernelSpec, Tensors
from halimede.kernels.target import Target
from halimede.kernels.tuning import KernelConfig, Pick, overriding

Call = Callable[[], Any]
TimeCalls = Callable[[Sequence[Call]], float]
"""Median seconds of a call; the calls do the same work with other tensors."""

# A reference computes in float64, for which small GPUs are slow: above, the launcher's own config is trusted.
_REFERENCE_FLOPS = 2_000_000_000_000
# Inputs together are so many times the L2 cache: each call finds there what no call before it has left.
_TIMES_L2 = 2
_MOST_COPIES = 64
_GRAPH_MS = 3.0
_MOST_CALLS = 2000  # of a graph
_REPLAYS = 7


class Bench(Protocol):
    """One spec for one case."""

    def seconds(self, config: KernelConfig) -> float:
        """Of a call with the config. KernelError, with the reason, if that is refused or its result wrong."""


class ConfigBench:
    """A Bench on a device, with random inputs of its own.

    own: the launcher's own config. On a CPU kernels are interpreted, for which `time_calls` must be given.
    """

    def __init__(
        self,
        spec: KernelSpec,
        case: Case,
        own: KernelConfig,
        target: Target,
        device: torch.device,
        time_calls: TimeCalls | None = None,
    ) -> None:
        assert spec.space is not None
        self._spec, self._target, self._error = spec, target, spec.space.error
        self._device, self._time_calls = device, time_calls or graph_seconds
        self._inputs = _inputs(case, device)
        is_large = case.work is not None and case.work.flops > _REFERENCE_FLOPS
        first = self._inputs[0]
        self._expected = self._run(own, first) if is_large else spec.reference(**first)

    def seconds(self, config: KernelConfig) -> float:
        """As Bench.seconds. RuntimeError of torch's if the GPU can be used no more."""
        try:
            self._check(config)
            with forcing(self._spec, config, self._target):
                return self._time_calls([partial(self._spec.launcher, **given) for given in self._inputs])
        except KernelError:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # raises if it was more than a refusal
            raise

    def _check(self, config: KernelConfig) -> None:
        with _poisoned_memory():
            actual = self._run(config, self._inputs[0])
        largest = max(map(difference, actual, self._expected), default=0.0)
        if not largest <= self._error:
            raise KernelError(
                f"the result of {self._spec.name} is off by {largest:.2g} of its largest value; "
                f"{self._error:.2g} is allowed"
            )

    def _run(self, config: KernelConfig, given: dict[str, Any]) -> Tensors:
        with forcing(self._spec, config, self._target):
            return self._spec.launcher(**given)


@contextlib.contextmanager
def gpu_bench(
    spec: KernelSpec, case: Case, own: KernelConfig, target: Target, device: torch.device
) -> Iterator[Bench]:
    """A ConfigBench on a GPU, whose memory is free again afterwards."""
    bench = ConfigBench(spec, case, own, target, device)
    try:
        yield bench
    finally:
        bench._inputs.clear()
        bench._expected = ()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def forcing(
    spec: KernelSpec,
    config: KernelConfig,
    target: Target,
    interceptor: Callable[[Launch], None] | None = None,
) -> Iterator[None]:
    """Launches of the spec's launcher inside use the config; they run, or are given to `interceptor`."""

    def choose(pick: Pick) -> KernelConfig | None:
        return config if pick.kernel == spec.name else None

    with overriding(target, choose) as own, intercepting(own, interceptor or _start):
        yield


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference as a part of the largest value of `theirs`; infinite where there is a NaN.

    For other types than floats 0 or infinite.
    """
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return float("inf")
    if not theirs.dtype.is_floating_point:
        return 0.0 if torch.equal(ours, theirs) else float("inf")
    if not theirs.numel():
        return 0.0
    expected = theirs.double()
    largest = float(expected.abs().max())
    found = float((ours.double() - expected).abs().max())
    if found != found:
        return float("inf")
    return found / largest if largest else (0.0 if not found else float("inf"))


def graph_seconds(calls: Sequence[Call]) -> float:
    """Median seconds of a call on the current GPU: a graph of some milliseconds, replayed."""
    passes = 1
    graph = _graph(calls, passes)
    pass_ms = min(_replay_ms(graph) for _ in range(3))
    if pass_ms < _GRAPH_MS:
        wanted = int(_GRAPH_MS / max(pass_ms, 1e-3)) + 1
        passes = max(1, min(wanted, _MOST_CALLS // len(calls)))
        graph = _graph(calls, passes)
        _replay_ms(graph)
    times = [_replay_ms(graph) for _ in range(_REPLAYS)]
    return float(statistics.median(times)) / 1e3 / (passes * len(calls))


def _graph(calls: Sequence[Call], passes: int) -> torch.cuda.CUDAGraph:
    """The calls, `passes` times. Not by torch.cuda.graph, whose garbage collection would take longer."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # memory of earlier graphs, which is nobody else's
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            for _ in range(passes):
                for call in calls:
                    call()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # that the capture is broken is known
                graph.capture_end()
            raise
        graph.capture_end()
    return graph


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def _inputs(case: Case, device: torch.device) -> list[dict[str, Any]]:
    """Arguments for calls that follow each other: on a GPU enough that its L2 cache does not hold them."""
    if device.type != "cuda":
        return [case.make(device)]
    before = torch.cuda.memory_allocated(device)
    made = [case.make(device)]
    size = max(1, torch.cuda.memory_allocated(device) - before)
    free, _ = torch.cuda.mem_get_info(device)
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    wanted = min(max(2, -(-_TIMES_L2 * l2 // size)), _MOST_COPIES, free // 2 // size)
    made += [case.make(device) for _ in range(wanted - 1)]
    return made


def _start(launch: Launch) -> None:
    if 0 in launch.grid:
        return
    device = launch.args[0].device
    if device.type == "cuda":
        kernels = device_kernels(current_library(), device)
        kernels.launch(launch.kernel, launch.grid, launch.args, launch.config, launch.constants)
        return
    from halimede.kernels.interpret import interpret

    interpret(launch.kernel, launch.grid, launch.args, dict(launch.constants))


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN: what the kernel does not write shows, even where a right result lay before."""
    # As torch.use_deterministic_algorithms(True), which imports torch.compile with it.
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
