"""Many requests at once through LLM: 1,000 of 1,024 tokens in and 1,024 out, 256 running.

PYTHONPATH=src python benchmarks/gpu/throughput.py --output throughput.json --budget 150

After --budget seconds it stops and reports what was done until then, and that it was cut short.
"""

import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from geometry import choose_geometry
from kernels_ahead import build_for_engines
from stage import Results, stage_arguments
from timing import gpu_memory

from halimede import LLM, SamplingParams
from halimede.engine.config import EngineConfig
from halimede.engine.outputs import RequestOutput
from halimede.engine.request_window import GenerateRequest

_FULL = 0.9  # of the rows that may run: a step with so many counts as one of the steady part


@dataclass(frozen=True)
class Load:
    requests: int
    input_tokens: int
    output_tokens: int
    settings: dict[str, Any]


FULL = Load(1000, 1024, 1024, {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "max_model_len": 2048})
REHEARSED = Load(
    3,
    5,
    2,
    {
        "max_num_seqs": 2,
        "max_num_batched_tokens": 16,
        "max_model_len": 16,
        "num_gpu_blocks_override": 8,
        "attention_backend": "triton",
    },
)


class Step(NamedTuple):
    """When a step returned, in seconds from the start, and how many tokens it gave."""

    time: float
    tokens: int


class OutOfTimeError(Exception):
    """The budget is spent."""


@dataclass
class StepLog:
    """Notes the steps of an engine's core, and ends the run when the budget is spent."""

    budget: float
    start: float = 0.0
    steps: list[Step] = field(default_factory=list)

    def watch(self, core: Any) -> None:
        run = core.step

        def step() -> Any:
            if time.perf_counter() - self.start > self.budget:
                raise OutOfTimeError
            updates = run()
            tokens = sum(len(update.new_token_ids) for update in updates)
            self.steps.append(Step(time.perf_counter() - self.start, tokens))
            return updates

        core.step = step


def steady_rate(steps: Sequence[Step], rows: int) -> float | None:
    """Output tokens per second between the first and the last step that gave almost every row a token.

    Prefills in between count, the filling at the start and the emptying at the end do not. None without such
    a part.
    """
    full = [index for index, step in enumerate(steps) if step.tokens >= _FULL * rows]
    if len(full) < 2:
        return None
    first, last = full[0], full[-1]
    tokens = sum(step.tokens for step in steps[first + 1 : last + 1])
    return tokens / (steps[last].time - steps[first].time)


def inter_token_ms(steps: Sequence[Step]) -> dict[str, float]:
    """Percentiles over tokens of the time since the step before: a running row gets a token at each step."""
    if len(steps) < 2:
        return {}
    times = np.diff([step.time for step in steps]) * 1e3
    each = np.repeat(times, [step.tokens for step in steps[1:]])
    return percentiles(each.tolist())


def percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"p{rank}": float(np.percentile(values, rank)) for rank in (50, 90, 99)}


def run(llm: LLM, load: Load, budget: float) -> dict[str, Any]:
    """All requests, or as many as the budget allows."""
    source, vocabulary = random.Random(0), range(llm.model_config.vocab_size)
    params = SamplingParams(max_tokens=load.output_tokens, ignore_eos=True)
    prompts = [source.choices(vocabulary, k=load.input_tokens) for _ in range(load.requests)]
    requests: list[GenerateRequest[None]] = [
        GenerateRequest({"prompt_token_ids": prompt}, params) for prompt in prompts
    ]
    log = StepLog(budget)
    log.watch(llm._core)
    done: list[RequestOutput] = []
    log.start, start = time.perf_counter(), time.monotonic()
    completed: Iterator[tuple[None, RequestOutput]] = llm.as_completed(requests)
    try:
        done.extend(output for _, output in completed)
        cut_short = False
    except OutOfTimeError:
        cut_short = True
    return {**figures(log.steps, done, load, start), "cut_short": cut_short}


def figures(steps: Sequence[Step], done: Sequence[RequestOutput], load: Load, start: float) -> dict[str, Any]:
    """start: of the run, by time.monotonic."""
    failed = [output for output in done if output.error is not None]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[0].error}")
    seconds, tokens = steps[-1].time, sum(step.tokens for step in steps)
    first = [o.metrics.first_token_time - start for o in done if o.metrics and o.metrics.first_token_time]
    return {
        "requests": load.requests,
        "finished": len(done),
        "seconds": seconds,
        "steps": len(steps),
        "output_tokens": tokens,
        "output_tok_s": tokens / seconds,
        "steady_output_tok_s": steady_rate(steps, load.settings["max_num_seqs"]),
        # Prompts of requests that had not finished were read too, so that this is the least it can be.
        "total_tok_s_at_least": (tokens + len(done) * load.input_tokens) / seconds,
        "ttft_s_of_finished": percentiles(first),
        "itl_ms": inter_token_ms(steps),
    }


def main() -> int:
    parser = stage_arguments(__doc__)
    parser.add_argument("--geometry", help="a preset or a file; default llama-3-8b, on a CPU tiny")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds of generating (150)")
    options = parser.parse_args()
    device = torch.device(options.device)
    rehearsed = device.type == "cpu"
    name = options.geometry or ("tiny" if rehearsed else "llama-3-8b")
    geometry, note = choose_geometry(name, gpu_memory(device))
    load = REHEARSED if rehearsed else FULL
    facts = {"input_tokens": load.input_tokens, "output_tokens_each": load.output_tokens}
    results = Results(options.output, device, geometry=geometry.name, settings=load.settings, **facts)
    if note:
        results.note(note)
    with tempfile.TemporaryDirectory() as folder, results.attempt("throughput"):
        settings: dict[str, Any] = {
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "device": options.device,
            "dtype": "bfloat16",
            **load.settings,
        }
        model = str(geometry.write(Path(folder)))
        build_for_engines([EngineConfig(model=model, **settings)], device)
        with LLM(model, **settings) as llm:
            warm = SamplingParams(max_tokens=3, ignore_eos=True)
            llm.generate([{"prompt_token_ids": [1, 2, 3]}], warm, use_tqdm=False)
            found = run(llm, load, options.budget)
        results.put("result", found)
        if found["cut_short"]:
            results.note(
                f"cut short after {found['seconds']:.0f} s: {found['finished']} of {load.requests} finished"
            )
        steady = found["steady_output_tok_s"]
        print(
            f"{found['finished']} of {load.requests} requests in {found['seconds']:.1f} s: "
            f"{found['output_tok_s']:.0f} output tok/s, {'no' if steady is None else f'{steady:.0f} in the'} "
            "steady part"
        )
    return results.status


if __name__ == "__main__":
    raise SystemExit(main())
