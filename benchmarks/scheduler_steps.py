"""One engine without a model in a given state, and the time that each part of its steps takes."""

import gc
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from halimede.engine.core import EngineCore
from halimede.engine.input_processor import ProcessedRequest
from halimede.engine.output_processor import OutputProcessor
from halimede.scheduler.config import SchedulerConfig
from halimede.scheduler.output import ModelRunnerOutput, SchedulerOutput, SequenceUpdate
from halimede.scheduler.request import Request
from halimede.scheduler.sampling_params import RequestOutputKind, SamplingParams
from halimede.scheduler.scheduler import Scheduler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK_SIZE = 16
PARTS = ("schedule", "update", "loop", "output")
# Token ids above the special tokens and the single bytes of every vocabulary in use.
_FIRST_TOKEN, _NUM_TOKENS = 1000, 20000


@dataclass(frozen=True)
class Case:
    """The state of the engine whose steps are timed.

    running, waiting: sequences. finished: requests served before. context: tokens of each running sequence.
    aligned: all sequences need their next block in the same step, not one in BLOCK_SIZE of them in each.
    shown: what the output processor makes: nothing until the end ("final"), or each step what is new
    ("delta") or all there is ("cumulative"). text: with detokenization.
    collector: "on", "frozen" (everything older than the steps is left out of collections) or "off".
    """

    running: int
    context: int = 128
    waiting: int = 0
    finished: int = 0
    aligned: bool = False
    shown: str = "delta"
    text: bool = False
    collector: str = "on"


@dataclass
class Times:
    """Seconds of each step, by part; "step" is their sum, "engine" that of schedule and update."""

    parts: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PARTS})

    def add(self, **seconds: float) -> None:
        """Note one step."""
        for name, value in seconds.items():
            self.parts[name].append(value)

    def extend(self, other: "Times") -> None:
        """Add another round of the same case."""
        for name, values in other.parts.items():
            self.parts[name] += values

    def summary(self) -> dict[str, dict[str, float]]:
        """Microseconds: median, mean, p90, p99 and min of each part."""
        samples = dict(self.parts)
        samples["engine"] = [sum(step) for step in zip(samples["schedule"], samples["update"], strict=True)]
        samples["step"] = [sum(step) for step in zip(*self.parts.values(), strict=True)]
        return {name: _quantiles(values) for name, values in samples.items()}


def _quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(1e6 * value for value in values)
    places = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99}
    found = {name: ordered[round(share * (len(ordered) - 1))] for name, share in places.items()}
    return {**found, "mean": sum(ordered) / len(ordered)}


class _TimedScheduler(Scheduler):
    """Notes how long its two calls of a step took."""

    schedule_s = update_s = 0.0

    def schedule(self) -> SchedulerOutput:
        start = time.perf_counter()
        output = super().schedule()
        self.schedule_s = time.perf_counter() - start
        return output

    def update(self, output: SchedulerOutput, result: ModelRunnerOutput) -> list[SequenceUpdate]:
        start = time.perf_counter()
        updates = super().update(output, result)
        self.update_s = time.perf_counter() - start
        return updates


class InstantExecutor:
    """Gives each sequence that samples the next token of a fixed list, whatever it ran."""

    def __init__(self, num_blocks: int, max_model_len: int) -> None:
        self.num_blocks = num_blocks
        self.max_model_len = max_model_len
        self.max_steps_in_flight = 1
        self.kernel_counters = None
        self.seconds = 0.0
        self._result = ModelRunnerOutput({})
        self._tokens = [(token,) for token in random.Random(1).choices(range(_NUM_TOKENS), k=4096)]
        self._step = 0

    def launch(self, output: SchedulerOutput) -> None:
        """Run one step; its time is no part of the engine's."""
        start = time.perf_counter()
        self._step += 1
        token, tokens = 7 * self._step, self._tokens
        sampled = {row[0]: tokens[(token + row[0]) & 4095] for row in output.scheduled if row.needs_sample}
        self._result = ModelRunnerOutput(sampled)
        self.seconds = time.perf_counter() - start

    def collect(self) -> ModelRunnerOutput:
        """What the step gave."""
        return self._result

    def abandon(self) -> None:
        """Nothing is in flight."""

    def shutdown(self) -> None:
        """Nothing to free."""


class TimedEngine:
    """Scheduler, core loop and output processor in the state that a case describes."""

    def __init__(self, case: Case, num_steps: int, tokenizer: "PreTrainedTokenizerBase | None") -> None:
        self.case = case
        max_model_len = case.context + num_steps + 2 * BLOCK_SIZE
        num_blocks = 1 + case.running * -(-max_model_len // BLOCK_SIZE)
        config = SchedulerConfig(
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_model_len=max_model_len,
            max_num_seqs=case.running,
            max_num_batched_tokens=case.running * max_model_len,
        )
        self.scheduler = _TimedScheduler(config)
        self.executor = InstantExecutor(num_blocks, max_model_len)
        self.core = EngineCore(self.scheduler, self.executor)
        self.outputs = OutputProcessor(tokenizer if case.text else None)
        self._random = random.Random(0)
        self._num_added = 0
        self._finish_requests()
        for index in range(case.running):
            self._add(case.context + (0 if case.aligned else index % BLOCK_SIZE))
        self.step()  # all the prompts
        for _ in range(case.waiting):
            self._add(case.context)
        assert self.scheduler.num_running == case.running, "not all sequences run"

    def step(self) -> dict[str, float]:
        """Run one step; the seconds of its parts."""
        start = time.perf_counter()
        updates = self.core.step()
        middle = time.perf_counter()
        self.outputs.process(updates)
        end = time.perf_counter()
        schedule, update = self.scheduler.schedule_s, self.scheduler.update_s
        loop = middle - start - schedule - update - self.executor.seconds
        return {"schedule": schedule, "update": update, "loop": loop, "output": end - middle}

    def _finish_requests(self) -> None:
        for first in range(0, self.case.finished, self.case.running):
            for _ in range(min(self.case.running, self.case.finished - first)):
                self._add(2 * BLOCK_SIZE, max_tokens=1)
            while self.core.has_unfinished:
                self.step()

    def _add(self, num_tokens: int, max_tokens: int | None = None) -> None:
        kind = {"final": "FINAL_ONLY"}.get(self.case.shown, self.case.shown.upper())
        params = SamplingParams(
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=self.case.text,
            output_kind=RequestOutputKind[kind],
        )
        prompt = tuple(self._random.choices(range(_FIRST_TOKEN, _NUM_TOKENS), k=num_tokens))
        request_id = f"request-{self._num_added}"
        self._num_added += 1
        request = Request(f"{request_id}-0", prompt, params, seed=0, arrival_time=0.0)
        self.outputs.add(ProcessedRequest(request_id, None, prompt, params, (request,)))
        self.core.add(request)


def time_case(
    case: Case, num_steps: int, num_warmup: int, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> Times:
    """Times of num_steps decode steps of a new engine in that state."""
    times = Times()
    gc.collect()
    engine = TimedEngine(case, num_warmup + num_steps + 1, tokenizer)
    for _ in range(num_warmup):
        engine.step()
    if case.collector != "on":
        gc.collect()
    if case.collector == "frozen":
        gc.freeze()
    elif case.collector == "off":
        gc.disable()
    try:
        for _ in range(num_steps):
            times.add(**engine.step())
    finally:
        gc.unfreeze()
        gc.enable()
    return times
