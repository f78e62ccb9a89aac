"""Decoding with the engine's own core: time of a step, tokens per second, share of the roofline, kernels.

PYTHONPATH=src python benchmarks/gpu/serving.py --output serving.json [--enforce-eager | --quantization int4]

Dummy weights, random prompts. A step's time is that between the returns of two steps, when all rows decode.
"""

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ceilings import load_ceilings
from engine_steps import SteppedEngine, profile_steps, summarise
from geometry import Geometry, choose_geometry
from kernels_ahead import build_for_engines
from roofline import decode_share
from stage import Results, stage_arguments
from timing import gpu_memory

from halimede.engine.config import EngineConfig
from halimede.engine.quant.online_names import ONLINE_METHODS


@dataclass(frozen=True)
class Plan:
    """What is measured. The most telling cases come first: time may end early."""

    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    profiled: frozenset[tuple[int, int]]  # batch, context
    untimed_steps: int
    timed_steps: int
    profiled_steps: int
    settings: dict[str, Any]

    @property
    def steps(self) -> int:
        """That rows decode, those included that are launched ahead or pay for the profiler."""
        return self.untimed_steps + self.timed_steps + self.profiled_steps + 8


GRAPHS = Plan(
    contexts=(1024, 8192),
    batches=(32, 1, 8, 256, 128),
    profiled=frozenset({(1, 1024), (32, 1024), (256, 1024), (32, 8192)}),
    untimed_steps=8,
    timed_steps=64,
    profiled_steps=6,
    settings={"max_num_seqs": 256, "max_num_batched_tokens": 8192, "max_model_len": 9216},
)
EAGER = replace(GRAPHS, contexts=(1024,), batches=(32, 1), profiled=frozenset({(1, 1024), (32, 1024)}))
QUANTIZED = replace(
    GRAPHS,
    contexts=(1024,),
    batches=(1, 16, 64),
    profiled=frozenset({(1, 1024), (64, 1024)}),
    settings={"max_num_seqs": 64, "max_num_batched_tokens": 8192, "max_model_len": 2048},
)
REHEARSED = Plan(
    contexts=(8,),
    batches=(2, 1, 9),  # the last is more than the cache holds
    profiled=frozenset({(2, 8)}),
    untimed_steps=1,
    timed_steps=1,
    profiled_steps=2,
    settings={
        "max_num_seqs": 9,
        "max_num_batched_tokens": 64,
        "max_model_len": 64,
        "num_gpu_blocks_override": 8,
        "attention_backend": "triton",
    },
)
REHEARSED_EAGER = replace(REHEARSED, batches=(1,), profiled=frozenset(), profiled_steps=0)


def plan_of(*, rehearsed: bool, eager: bool, quantized: bool) -> Plan:
    if rehearsed:
        return REHEARSED_EAGER if eager or quantized else REHEARSED
    return QUANTIZED if quantized else EAGER if eager else GRAPHS


def measure_case(
    engine: SteppedEngine, geometry: Geometry, plan: Plan, batch: int, context: int, rate: float, *, gpu: bool
) -> dict[str, Any]:
    """One batch at one context. rate: bytes per second of a copy."""
    weight_bytes = engine.streamed_bytes if engine.is_quantized else None
    prefilled = engine.prefill(batch, context)
    for _ in range(plan.untimed_steps):
        engine.step()
    before = engine.mean_context
    times = engine.timed_steps(plan.timed_steps)
    mean_context = (before + engine.mean_context) / 2
    ms = float(np.median(times))
    row = {
        "batch": batch,
        "context": context,
        "mean_context": mean_context,
        "steps": len(times),
        "ms": ms,
        "p99_ms": float(np.percentile(times, 99)),
        "tok_s": batch / ms * 1e3,
        "prefill": prefilled,
        **decode_share(geometry, batch, mean_context, ms, rate, weight_bytes=weight_bytes),
    }
    if (batch, context) in plan.profiled:
        activities, num_steps = profile_steps(engine, plan.profiled_steps, gpu=gpu)
        row["profile"] = summarise(activities, num_steps, geometry.num_layers, ms)
    return row


def measure(results: Results, engine: SteppedEngine, geometry: Geometry, plan: Plan, rate: float) -> None:
    gpu = not results.rehearsal
    for context in plan.contexts:
        for batch in plan.batches:
            what = f"batch {batch}, context {context}"
            lack = engine.lack_of_blocks(batch, context)
            if lack is not None:
                results.add("rows", {"batch": batch, "context": context, "skipped": lack})
                print(f"{what}: left out, {lack}", flush=True)
                continue
            with results.attempt(what):
                try:
                    row = measure_case(engine, geometry, plan, batch, context, rate, gpu=gpu)
                finally:
                    engine.stop()
                results.add("rows", row)
                print(line_of(row), flush=True)


def line_of(row: dict[str, Any]) -> str:
    text = (
        f"batch {row['batch']:>3} at {row['context']:>5}: {row['ms']:7.3f} ms (p99 {row['p99_ms']:.3f}), "
        f"{row['tok_s']:9.1f} tok/s, {row['share']:.0%} of the roofline"
    )
    if "profile" in row:
        text += f", host gap {row['profile']['host_gap_ms']:.3f} ms"
    return text


def main() -> int:
    parser = stage_arguments(__doc__)
    parser.add_argument("--geometry", help="a preset or a file; default llama-3-8b, on a CPU tiny")
    parser.add_argument("--enforce-eager", action="store_true", help="without graphs")
    parser.add_argument("--quantization", choices=ONLINE_METHODS, help="of the weights; default: none")
    parser.add_argument("--block-size", type=int, default=16)
    options = parser.parse_args()
    device = torch.device(options.device)
    rehearsed = device.type == "cpu"
    name = options.geometry or ("tiny" if rehearsed else "llama-3-8b")
    geometry, note = choose_geometry(name, gpu_memory(device))
    quantization = options.quantization
    plan = plan_of(rehearsed=rehearsed, eager=options.enforce_eager, quantized=quantization is not None)
    settings = {**plan.settings, "block_size": options.block_size, "enforce_eager": options.enforce_eager}
    facts = {"geometry": geometry.name, "quantization": quantization, "settings": settings}
    results = Results(options.output, device, **facts)
    if note:
        results.note(note)
    if rehearsed:
        results.note("no GPU: kernels are torch's operations on the CPU, graphs there are none")
    rate = load_ceilings(options.output.parent, device)["copy_bytes_per_s"]
    results.put("copy_bytes_per_s", rate)
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(
            model=str(geometry.write(Path(folder))),
            load_format="dummy",
            skip_tokenizer_init=True,
            device=options.device,
            dtype="bfloat16",
            quantization=quantization,
            **settings,
        )
        build_for_engines([config], device)
        start = time.perf_counter()
        engine = SteppedEngine(config, plan.steps)
        results.put("startup_s", time.perf_counter() - start)  # weights, KV cache, graphs
        results.put("streamed_bytes", engine.streamed_bytes)
        measure(results, engine, geometry, plan, rate)
        engine.shutdown()
    return results.status


if __name__ == "__main__":
    raise SystemExit(main())
