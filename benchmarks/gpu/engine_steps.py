"""Drives the engine's core step by step, as every front end does, and times the steps."""

import random
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from gpu_trace import STEP, Activity, busy_us, by_group, gaps_us, read_trace, steps_of
from torch import nn

from halimede import SamplingParams
from halimede.engine.build import build_core, open_model
from halimede.engine.config import EngineConfig
from halimede.engine.executor.local import LocalExecutor
from halimede.engine.layers.embedding import Embedding
from halimede.scheduler.output import SequenceUpdate
from halimede.scheduler.request import Request

_KNOWN = 0.75


class SteppedEngine:
    """An engine of dummy weights whose steps are run one by one, and rows that all decode.

    extra_steps: that rows decode once all of them do. streamed_bytes: of the weights that a step reads.
    """

    def __init__(self, config: EngineConfig, extra_steps: int) -> None:
        files, model = open_model(config)
        self._core, executor = build_core(config, files, model)
        assert isinstance(executor, LocalExecutor)
        self.is_quantized = model.quantization is not None
        self.streamed_bytes = streamed_bytes(executor._alive()._model)
        self._block_size, self._num_blocks = config.block_size, executor.num_blocks
        self._chunk = config.max_num_batched_tokens
        self._vocabulary = range(model.vocab_size)
        self._extra_steps = extra_steps
        self._lengths: dict[str, int] = {}
        self._num_added = 0
        self._prompts: dict[int, list[tuple[int, ...]]] = {}

    def lack_of_blocks(self, batch: int, context: int) -> str | None:
        """Why so many rows cannot run at once; None if they can."""
        length = context + self._new_tokens(batch, context)
        needed = batch * -(-length // self._block_size) + 1
        if needed <= self._num_blocks:
            return None
        return (
            f"{needed} KV cache blocks of {self._block_size} tokens are needed, there are {self._num_blocks}"
        )

    def prefill(self, batch: int, context: int) -> dict[str, float]:
        """Start `batch` rows of `context` random tokens and run until all of them decode.

        The rows of a smaller batch are those that a larger one begins with, so that their prefixes may be
        cached: prompt tokens that were really computed are counted apart.
        """
        prompts = self._prompts.setdefault(context, [])
        while len(prompts) < batch:
            prompts.append(
                tuple(random.Random(f"{context} {len(prompts)}").choices(self._vocabulary, k=context))
            )
        params = SamplingParams(temperature=0, max_tokens=self._new_tokens(batch, context), ignore_eos=True)
        waiting = {self._add(prompt, params) for prompt in prompts[:batch]}
        start, cached = time.perf_counter(), 0
        while waiting:
            for update in self.step():
                if update.request_id in waiting:
                    waiting.remove(update.request_id)
                    cached += update.num_cached_tokens
        seconds = time.perf_counter() - start
        return {"computed_tokens": batch * context - cached, "seconds": seconds}

    def step(self) -> Sequence[SequenceUpdate]:
        """One step of the core. RuntimeError for a row that failed or ended: none should."""
        updates = self._core.step()
        for update in updates:
            if update.finish_reason is not None:
                raise RuntimeError(f"a row ended ({update.finish_reason}): {update.error}")
            self._lengths[update.request_id] += len(update.new_token_ids)
        return updates

    @property
    def mean_context(self) -> float:
        """Tokens of a row."""
        return sum(self._lengths.values()) / len(self._lengths)

    def timed_steps(self, count: int) -> list[float]:
        """Milliseconds between the returns of successive steps, each of which gives every row a token."""
        times, tokens = [time.perf_counter()], 0
        for _ in range(count):
            tokens += sum(len(update.new_token_ids) for update in self.step())
            times.append(time.perf_counter())
        if tokens != count * len(self._lengths):
            raise RuntimeError(f"{count} steps of {len(self._lengths)} rows gave {tokens} tokens")
        return [(end - start) * 1e3 for start, end in pairwise(times)]

    def stop(self) -> None:
        """End all rows."""
        ids = list(self._lengths)
        self._lengths.clear()
        for request_id in ids:
            self._core.abort(request_id)
        while self._core.has_unfinished:
            self._core.step()

    def shutdown(self) -> None:
        self._core.shutdown()

    def _new_tokens(self, batch: int, context: int) -> int:
        """Of a row: rows decode while others are still prefilled, a step for each chunk of the prompts."""
        return -(-batch * context // self._chunk) + batch // 8 + self._extra_steps

    def _add(self, prompt: tuple[int, ...], params: SamplingParams) -> str:
        self._num_added += 1
        request_id = str(self._num_added)
        self._core.add(Request(request_id, prompt, params, seed=0, arrival_time=time.monotonic()))
        self._lengths[request_id] = len(prompt)
        return request_id


def streamed_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights, in the form that they are multiplied in, each counted once.

    An embedding that is not the output layer too is left out: of it a step reads a few rows.
    """
    found: dict[int, int] = {}
    for module in model.modules():
        if not isinstance(module, Embedding):
            tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            found |= {id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}
    return sum(found.values())


def profile_steps(engine: SteppedEngine, count: int, *, gpu: bool) -> tuple[list[Activity], int]:
    """What ran in some steps, and how many those are.

    They are `count` where launches are known; one more, which pays for the profiler, where they are not.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=kinds) as profiler:
            for _ in range(count + 1):
                with record_function(STEP):
                    engine.step()
            if gpu:
                torch.cuda.synchronize()
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        activities = read_trace(path, gpu=gpu)
    # Those of no step were launched before the first one, if they are few.
    known = [activity for activity in activities if activity.step is not None]
    if len(known) < _KNOWN * len(activities):
        return activities, count + 1
    return [activity for activity in known if activity.step], count


def summarise(
    activities: Sequence[Activity], num_steps: int, num_layers: int, wall_ms: float
) -> dict[str, Any]:
    """Time by kernel and idle time. wall_ms: of a step without the profiler.

    host_gap_ms: the median time from a step's last kernel to the next one's first. Where the launches are not
    known it is what the kernels leave of wall_ms, which `host_gap_from` says.
    """
    steps = steps_of(activities)
    busy_ms = busy_us(activities) / num_steps / 1e3
    gaps = sorted(gaps_us(steps))
    known = bool(gaps) and sum(map(len, steps)) == len(activities)
    gap_ms = gaps[len(gaps) // 2] / 1e3 if known else max(0.0, wall_ms - busy_ms)
    return {
        "busy_ms": busy_ms,
        "idle_of_wall_ms": wall_ms - busy_ms,
        "host_gap_ms": gap_ms,
        "host_gap_from": "kernels" if known else "wall time less kernel time",
        "groups": by_group(activities, num_steps, num_layers),
    }
