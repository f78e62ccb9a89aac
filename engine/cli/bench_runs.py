"""The measurements of `halimede bench throughput` and `halimede bench latency`."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halimede.engine.cli.bench_prompts import BenchRequest
from halimede.scheduler.sampling_params import SamplingParams

if TYPE_CHECKING:
    from halimede.engine.llm import LLM
    from halimede.engine.outputs import RequestOutput

PERCENTILES = (10, 25, 50, 75, 90, 99)


@dataclass(frozen=True, slots=True)
class Throughput:
    """A run of many requests that were there from the start. Times in seconds, one entry per request.

    ttft: from the start to the first token, so with the wait in the queue. tpot: per token after the first.
    """

    elapsed_time: float
    num_prompt_tokens: int
    num_output_tokens: int
    ttft: list[float]
    tpot: list[float]
    e2el: list[float]

    def as_json(self) -> dict[str, Any]:
        """The numbers under vLLM's names, where it has them."""
        total = self.num_prompt_tokens + self.num_output_tokens
        return {
            "elapsed_time": self.elapsed_time,
            "num_requests": len(self.e2el),
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_output_tokens": self.num_output_tokens,
            "total_num_tokens": total,
            "requests_per_second": len(self.e2el) / self.elapsed_time,
            "tokens_per_second": total / self.elapsed_time,
            "output_tokens_per_second": self.num_output_tokens / self.elapsed_time,
            "ttft_s": percentiles(self.ttft),
            "tpot_s": percentiles(self.tpot),
            "e2el_s": percentiles(self.e2el),
        }


def measure_throughput(llm: "LLM", requests: Sequence[BenchRequest], *, show_progress: bool) -> Throughput:
    """Give all requests to one call of generate(), with the default sampling, as vLLM's benchmark does."""
    start = time.monotonic()
    outputs = _generate(llm, requests, show_progress=show_progress)
    elapsed = time.monotonic() - start
    ttft, tpot, e2el = [], [], []
    for output in outputs:
        count, metrics = len(output.outputs[0].token_ids), output.metrics
        assert metrics is not None
        assert metrics.first_token_time is not None
        assert metrics.finished_time is not None
        ttft.append(metrics.first_token_time - start)
        e2el.append(metrics.finished_time - start)
        if count > 1:
            tpot.append((metrics.finished_time - metrics.first_token_time) / (count - 1))
    return Throughput(
        elapsed_time=elapsed,
        num_prompt_tokens=sum(len(output.prompt_token_ids or ()) for output in outputs),
        num_output_tokens=sum(len(output.outputs[0].token_ids) for output in outputs),
        ttft=ttft,
        tpot=tpot,
        e2el=e2el,
    )


def measure_latency(llm: "LLM", batches: Sequence[Sequence[BenchRequest]]) -> list[float]:
    """Seconds that each batch takes, all of its tokens generated."""
    seconds = []
    for batch in batches:
        start = time.monotonic()
        _generate(llm, batch, show_progress=False)
        seconds.append(time.monotonic() - start)
    return seconds


def _generate(llm: "LLM", requests: Sequence[BenchRequest], *, show_progress: bool) -> "list[RequestOutput]":
    outputs = llm.generate(
        [{"prompt_token_ids": request.prompt_token_ids} for request in requests],
        [SamplingParams(max_tokens=request.output_len, ignore_eos=True) for request in requests],
        use_tqdm=show_progress,
    )
    for request, output in zip(requests, outputs, strict=True):
        count = len(output.outputs[0].token_ids)
        assert count == request.output_len, f"{count} new tokens, {request.output_len} were asked for"
    return outputs


def percentiles(values: Sequence[float]) -> Mapping[str, float]:
    """mean, and the PERCENTILES as "p50" and so on; empty for no values."""
    import numpy as np

    if not values:
        return {}
    found = np.percentile(values, PERCENTILES)
    named = {f"p{rank}": float(value) for rank, value in zip(PERCENTILES, found, strict=True)}
    return {"mean": float(np.mean(values)), **named}
