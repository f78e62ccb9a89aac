"""What a decode step costs the host beside the device's work: scheduler, core, runner, sampling metadata.

PYTHONPATH=src python benchmarks/host_time.py

The model has no layers and the kernels do nothing, but for a token: what is left is the host. `gpu` is what a
GPU's host does, its launches and uploads included but for the driver's part; `cpu` what a CPU's does.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from halimede.engine.core import EngineCore
from halimede.engine.model_input import ModelInput
from halimede.engine.runner.build_runner import make_device_runner, make_host_runner
from halimede.engine.runner.device_rows import DeviceRows
from halimede.engine.runner.model_runner import ModelRunner
from halimede.engine.runner.row_table import StepPlan
from halimede.engine.runner.rows import RowLimits
from halimede.engine.runner.step_queue import HostQueue
from halimede.kernels.launch import Launch, intercepting
from halimede.kernels.target import TARGETS
from halimede.scheduler.config import SchedulerConfig
from halimede.scheduler.request import Request
from halimede.scheduler.sampling_params import SamplingParams
from halimede.scheduler.scheduler import Scheduler

if TYPE_CHECKING:
    from halimede.engine.models.base import CausalLM
    from halimede.engine.runner.decode_graphs import DecodeGraphs
    from halimede.engine.runner.host_rows import HostRows

T = TypeVar("T")
VOCAB, BLOCK_SIZE, PROMPT = 512, 16, 16
PARAMS = {
    "greedy": SamplingParams(temperature=0, max_tokens=None),
    "drawn": SamplingParams(temperature=0.8, top_p=0.95, max_tokens=None),
    "min_tokens": SamplingParams(temperature=0.8, min_tokens=4000, stop_token_ids=[3], max_tokens=None),
    "penalties": SamplingParams(temperature=0.8, repetition_penalty=1.1, max_tokens=None),
}


class Stopwatch:
    """Seconds spent in what is not the host's own work."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def off(self, function: Callable[..., T]) -> Callable[..., T]:
        """The function, whose time is taken off the host's."""

        def timed(*args: Any, **options: Any) -> T:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


class NoLayers:
    """A CausalLM as the runner sees it, whose logits are always the same."""

    def __init__(self, max_rows: int, watch: Stopwatch) -> None:
        self.config = SimpleNamespace(vocab_size=VOCAB)
        self._logits = torch.randn(max_rows, VOCAB)
        self.compute_logits = watch.off(lambda hidden_states: self._logits[: len(hidden_states)].clone())

    def __call__(self, model_input: ModelInput, kv_caches: Any) -> torch.Tensor:
        return self._logits[: len(model_input.logits_indices)]


class NoGraphs:
    """Graphs of every size whose replay costs nothing."""

    def __init__(self, max_rows: int) -> None:
        self._logits = torch.zeros(max_rows, VOCAB)

    def size_for(self, plan: StepPlan) -> int | None:
        return len(self._logits) if plan.layout.decodes else None

    def replay(self, size: int) -> torch.Tensor:
        return self._logits


class Executor:
    """A runner of two steps in flight, so that everything that overlap does is done."""

    kernel_counters = None
    max_steps_in_flight = 2

    def __init__(self, runner: ModelRunner, config: SchedulerConfig) -> None:
        self.num_blocks, self.max_model_len = config.num_blocks, config.max_model_len
        self.launch, self.collect, self.abandon = runner.launch, runner.collect, runner.abandon

    def start_profile(self, folder: str) -> None:
        raise NotImplementedError

    def stop_profile(self) -> str:
        raise NotImplementedError

    def shutdown(self) -> None:
        """Nothing to free."""


def no_kernel(launch: Launch) -> None:
    """What a kernel would write that the host looks at: the tokens, which then are those of an empty row."""
    if "draw" in launch.kernel.__name__:
        for arg in launch.args:
            if isinstance(arg, torch.Tensor) and arg.dtype == torch.int64:
                arg.zero_()


def make_core(kind: str, rows: int, watch: Stopwatch) -> EngineCore:
    """kind: "gpu" or "cpu"."""
    max_len = PROMPT + 600
    config = SchedulerConfig(
        num_blocks=1 + rows * (-(-max_len // BLOCK_SIZE)),
        block_size=BLOCK_SIZE,
        max_model_len=max_len,
        max_num_seqs=rows,
        max_num_batched_tokens=rows * PROMPT * 2,
        enable_prefix_caching=True,
    )
    limits = RowLimits(rows, config.max_num_batched_tokens, max_len, BLOCK_SIZE)
    model = cast("CausalLM", NoLayers(rows, watch))
    if kind == "cpu":
        runner = make_host_runner(model, [], limits)
        rows_of = cast("HostRows", runner._rows)
        rows_of._sampler.launch = watch.off(rows_of._sampler.launch)  # type: ignore[method-assign]
    else:
        graphs = cast("DecodeGraphs", NoGraphs(rows))
        device_rows = DeviceRows(limits, torch.device("cpu"))
        runner = make_device_runner(model, [], limits, device_rows, HostQueue(), graphs)
    return EngineCore(Scheduler(config), Executor(runner, config))


def make_decoding(kind: str, params: SamplingParams, rows: int, watch: Stopwatch) -> EngineCore:
    """A core whose first step starts so many sequences."""
    core = make_core(kind, rows, watch)
    for row in range(rows):
        prompt = tuple((row * 7 + i) % VOCAB for i in range(PROMPT + row % BLOCK_SIZE))
        core.add(Request(str(row), prompt, params, seed=row, arrival_time=0.0))
    return core


def step_times(kind: str, params: SamplingParams, rows: int, steps: int) -> list[float]:
    """Seconds of the host in each of so many decode steps, those of the device taken off.

    Prompts differ in length, so that in each step one sequence in BLOCK_SIZE begins a block.
    """
    watch = Stopwatch()
    with intercepting(TARGETS["sm_90"], watch.off(no_kernel)) if kind == "gpu" else nullcontext():
        core = make_decoding(kind, params, rows, watch)
        for _ in range(2 * BLOCK_SIZE):
            core.step()
        found = []
        for _ in range(steps):
            watch.seconds, start = 0.0, time.perf_counter()
            updates = core.step()
            found.append(time.perf_counter() - start - watch.seconds)
            assert len(updates) == rows
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", default="1,32,256")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    results = []
    print(f"{'host':<6}{'sampling':<12}{'rows':>6}{'least us':>12}{'median':>8}{'p90':>8}{'p99':>8}")
    for kind in ("gpu", "cpu"):
        for name, params in PARAMS.items():
            for rows in map(int, options.rows.split(",")):
                times = sorted(1e6 * t for t in step_times(kind, params, rows, options.steps))
                least, median, p90, p99 = (
                    times[int(share * (len(times) - 1))] for share in (0, 0.5, 0.9, 0.99)
                )
                figures = {"least_us": least, "median_us": median, "p90_us": p90, "p99_us": p99}
                results.append({"host": kind, "sampling": name, "rows": rows, **figures})
                shown = f"{least:>12.0f}{median:>8.0f}{p90:>8.0f}{p99:>8.0f}"
                print(f"{kind:<6}{name:<12}{rows:>6}{shown}", flush=True)
    if options.output is not None:
        report = {"python": platform.python_version(), "torch": torch.__version__, "results": results}
        options.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
