"""Runner and core with steps in flight on a device that takes its time: tokens as in the synchronous loop."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from delayed_queue import DelayedQueue
from tiny_models import VOCAB_SIZE, load_model, make_kv_caches, write_tiny_checkpoint

from halimede.engine.core import EngineCore
from halimede.engine.layers.attention_gpu import GpuBackend, TritonAttention
from halimede.engine.models.base import CausalLM
from halimede.engine.runner.build_runner import make_device_runner, make_graphs, make_host_runner
from halimede.engine.runner.decode_graphs import DecodeGraphs, capture_sizes
from halimede.engine.runner.device_rows import DeviceRows
from halimede.engine.runner.model_runner import ModelRunner
from halimede.engine.runner.rows import RowLimits
from halimede.engine.runner.step_queue import HostQueue, StepQueue
from halimede.scheduler.config import SchedulerConfig
from halimede.scheduler.output import ModelRunnerOutput, SchedulerOutput, TokenLogprobs
from halimede.scheduler.request import Request
from halimede.scheduler.sampling_params import SamplingParams
from halimede.scheduler.scheduler import Scheduler

CPU = torch.device("cpu")
NUM_PLANS = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    return load_model(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


@dataclass
class Result:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    reason: str | None = None
    error: str | None = None


class RunnerExecutor:
    """A runner as an executor; lateness: steps that had to wait for tokens before they were sampled from."""

    kernel_counters = None

    def __init__(self, runner: ModelRunner, config: SchedulerConfig, depth: int) -> None:
        self.num_blocks, self.max_model_len = config.num_blocks, config.max_model_len
        self.max_steps_in_flight = depth
        self.runner = runner
        self.lateness = 0

    def launch(self, output: SchedulerOutput) -> None:
        self.runner.launch(output)
        self.lateness += self.runner._in_flight[-1].waits

    def collect(self) -> ModelRunnerOutput:
        return self.runner.collect()

    def abandon(self) -> None:
        self.runner.abandon()

    def start_profile(self, folder: str) -> None:
        raise NotImplementedError

    def stop_profile(self) -> str:
        raise NotImplementedError

    def shutdown(self) -> None:
        pass


def make_params(rng: random.Random) -> SamplingParams:
    maybe: dict[str, Any] = {
        "temperature": rng.choice((0.0, 0.0, 0.8, 1.5)),
        "max_tokens": rng.choice((1, 3, 7, 12)),
        "stop_token_ids": [rng.randrange(VOCAB_SIZE) for _ in range(40)] if rng.random() < 0.4 else None,
        "logprobs": rng.choice((None, None, 2)),
        "prompt_logprobs": rng.choice((None, None, None, 1)),
        "repetition_penalty": rng.choice((1.0, 1.0, 1.0, 1.4)),
        "top_p": rng.choice((1.0, 0.8)),
        "min_tokens": rng.choice((0, 0, 1)),
    }
    return SamplingParams(**maybe)


@dataclass(frozen=True)
class Plan:
    config: SchedulerConfig
    requests: tuple[tuple[int, Request], ...]
    aborts: dict[str, int]

    @classmethod
    def make(cls, seed: int) -> "Plan":
        rng = random.Random(seed)
        config = SchedulerConfig(
            num_blocks=rng.choice((9, 14, 30)),
            block_size=4,
            max_model_len=32,
            max_num_seqs=rng.choice((1, 3, 6)),
            max_num_batched_tokens=rng.choice((6, 9, 32)),
        )
        shared = rng.choices(range(3, VOCAB_SIZE), k=16)
        requests, aborts = [], {}
        for number in range(rng.randrange(2, 7)):
            tokens = shared[: rng.choice((0, 4, 12))] + rng.choices(
                range(3, VOCAB_SIZE), k=rng.randrange(1, 7)
            )
            words = ((tokens[-1], rng.randrange(VOCAB_SIZE)),) if rng.random() < 0.2 else ()
            request = Request(
                str(number),
                tuple(tokens),
                make_params(rng),
                rng.getrandbits(70),
                0.0,
                bad_words_token_ids=words,
            )
            requests.append((rng.randrange(6), request))
            if rng.random() < 0.15:
                aborts[str(number)] = rng.randrange(1, 4)
        return cls(config, tuple(requests), aborts)


def limits_of(config: SchedulerConfig) -> RowLimits:
    return RowLimits(
        config.max_num_seqs, config.max_num_batched_tokens, config.max_model_len, config.block_size
    )


def make_runner(model: CausalLM, config: SchedulerConfig, queue: StepQueue) -> ModelRunner:
    """Over a cache that holds NaN wherever nothing was written."""
    caches = make_kv_caches(model, config.num_blocks, config.block_size, fill=math.nan)
    for kv_cache in caches:
        for cache in kv_cache.tensors:
            cache[0] = 0.0
    return make_host_runner(model, caches, limits_of(config), queue)


def live(plan: Plan, runner: ModelRunner, depth: int) -> tuple[dict[str, Result], RunnerExecutor]:
    executor = RunnerExecutor(runner, plan.config, depth)
    scheduler = Scheduler(plan.config)
    core = EngineCore(scheduler, executor)
    waiting, turn = sorted(plan.requests, key=lambda r: r[0]), 0
    results: dict[str, Result] = {}
    while waiting or core.has_unfinished:
        while waiting and waiting[0][0] <= turn:
            request = waiting.pop(0)[1]
            core.add(request)
            results[request.request_id] = Result()
        for update in core.step():
            result = results[update.request_id]
            assert result.reason is None
            result.tokens += update.new_token_ids
            result.logprobs += update.logprobs
            result.prompt_logprobs += update.prompt_logprobs
            result.reason, result.error = update.finish_reason, update.error
        for name, count in plan.aborts.items():
            if name in results and results[name].reason is None and len(results[name].tokens) >= count:
                assert core.abort(name) is not None
                results[name].reason = "abort"
        turn += 1
    return results, executor


def test_random_plans_give_what_the_synchronous_loop_gives(model: CausalLM) -> None:
    late, deep, reasons = 0, 0, set()
    for seed in range(NUM_PLANS):
        plan = Plan.make(seed)
        expected, _ = live(plan, make_runner(model, plan.config, HostQueue()), depth=1)
        queue = DelayedQueue(seed)
        got, executor = live(plan, make_runner(model, plan.config, queue), depth=2)
        assert got.keys() == expected.keys()
        for name, result in got.items():
            wanted = expected[name]
            assert (result.tokens, result.reason) == (wanted.tokens, wanted.reason), f"plan {seed}"
            assert result.error is None
            for ours, theirs in (
                (result.logprobs, wanted.logprobs),
                (result.prompt_logprobs, wanted.prompt_logprobs),
            ):
                assert [e.token_ids for e in ours] == [e.token_ids for e in theirs], f"plan {seed}"
            reasons.add(result.reason)
        late += executor.lateness
        deep = max(deep, queue.longest)
    assert late > 10
    assert deep > 2
    assert reasons == {"stop", "length", "abort"}


class Recording:
    """A recorder without a GPU: a replay runs the work again, over inputs that stay where they are, and
    writes the tensor that the recorded run returned. limit: rows of the largest that the memory holds."""

    def __init__(self, limit: int = 1 << 30) -> None:
        self.limit = limit
        self.recorded: list[int] = []
        self.replayed = 0
        self.released = 0

    def record(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        output = work()
        if len(output) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.recorded.append(len(output))

        def replay() -> torch.Tensor:
            self.replayed += 1
            return output.copy_(work())

        return replay

    def release(self) -> None:
        self.released += 1


def make_graph_runner(
    model: CausalLM, config: SchedulerConfig, queue: StepQueue, recorder: Recording, *, lazily: bool = False
) -> tuple[ModelRunner, DecodeGraphs]:
    caches = make_kv_caches(model, config.num_blocks, config.block_size, fill=0.0)
    limits = limits_of(config)
    rows = DeviceRows(limits, CPU)
    sizes = capture_sizes(config.max_num_seqs)
    graphs = make_graphs(model, caches, rows, recorder, sizes, lazily=lazily)
    graphs.record_all()
    return make_device_runner(model, caches, limits, rows, queue, graphs), graphs


@pytest.fixture(scope="module")
def triton_model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    """One whose kernels are interpreted."""
    backend = GpuBackend(TritonAttention(32, 6))
    return load_model(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")), backend=backend)


def plan_for_triton(seed: int) -> Plan:
    """With blocks as large as kernels take them, few of them, and few tokens: they are interpreted."""
    plan = Plan.make(seed)
    requests = [
        (turn, replace(request, sampling_params=request.sampling_params.replace(max_tokens=3)))
        for turn, request in plan.requests[:3]
    ]
    return Plan(replace(plan.config, block_size=16, num_blocks=6), tuple(requests), plan.aborts)


@pytest.mark.parametrize(("seed", "lazily"), [(0, False), (4, True)])
def test_graphs_give_what_steps_without_them_give(
    model: CausalLM, triton_model: CausalLM, seed: int, lazily: bool
) -> None:
    """Padding, lengths read on the device, and nothing kept of the step that a graph was made from."""
    plan = plan_for_triton(seed)
    expected, _ = live(plan, make_runner(model, plan.config, HostQueue()), depth=1)
    recorder = Recording()
    runner, _ = make_graph_runner(triton_model, plan.config, DelayedQueue(seed), recorder, lazily=lazily)
    before = recorder.replayed
    got, _ = live(plan, runner, depth=2)
    assert {name: r.tokens for name, r in got.items()} == {name: r.tokens for name, r in expected.items()}
    assert recorder.replayed > before


def test_what_does_not_fit_runs_without_a_graph(
    model: CausalLM, triton_model: CausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_for_triton(4)
    plan = replace(plan, requests=plan.requests[:2])
    assert plan.config.max_num_seqs > 2
    recorder = Recording(limit=2)
    runner, graphs = make_graph_runner(triton_model, plan.config, HostQueue(), recorder)
    assert graphs.sizes == [1, 2]
    assert recorder.released == len(capture_sizes(plan.config.max_num_seqs)) - 2
    assert "no memory for a graph of" in caplog.text
    assert "Tried to allocate 2.00 GiB" in caplog.text
    expected, _ = live(plan, make_runner(model, plan.config, HostQueue()), depth=1)
    got, _ = live(plan, runner, depth=1)
    assert {name: r.tokens for name, r in got.items()} == {name: r.tokens for name, r in expected.items()}
