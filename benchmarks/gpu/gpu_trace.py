"""What the GPU did in each step, read from the trace of torch's profiler: time by kernel, idle time.

A kernel belongs to the step whose code launched it: the profiler ties a kernel to its launch by a number, and
the launch lies within the range that `step_range` marks. So steps may overlap, as those of an engine do that
launches the next one before it has the last one's tokens.
"""

import json
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEP = "halimede step"
_ON_GPU = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_LAUNCHES = frozenset({"cuda_runtime", "cuda_driver"})

# The first that matches; names are of our kernels, cuBLAS, CUTLASS, hipBLASLt, Triton's and torch's.
_GROUPS: tuple[tuple[str, str], ...] = (
    ("attention", r"attention_decode|prefill_kernel|fmha|flash|attention"),
    ("gated projection", r"gated_matmul"),
    ("quantized products", r"wna16|(scaled|int8|fp8|fp8_weight)_matmul|scaled_mm"),
    (
        "matrix products",
        r"gemm|gemv|nvjet|cutlass|cijk|splitk|cublas|xmma|matmul|aten::(mm|addmm|linear|bmm)",
    ),
    ("rotary, KV write", r"rotary_kv"),
    ("norms", r"_norm_kernel|_norm_quant_kernel|layer_norm|rms_norm"),
    ("activation", r"activate_|_quantize_kernel"),
    ("embedding", r"_embed_kernel|embedding"),
    ("sampling", r"_(draw|threshold|bias|penalty|ban|mask|logprobs)_kernel"),
    ("copies", r"memcpy|memset|copy_blocks|aten::(copy_|to|_to_copy|fill_)"),
    ("torch's small kernels", r"at::native|aten::"),
)


@dataclass(frozen=True, slots=True)
class Activity:
    """One kernel or copy, in microseconds of the trace. step: None if its launch is not known."""

    name: str
    start: float
    end: float
    step: int | None = None


def group_of(name: str) -> str:
    """What a kernel is for, by its name."""
    return next((group for group, pattern in _GROUPS if re.search(pattern, name, re.IGNORECASE)), "other")


def read_trace(path: Path, *, gpu: bool) -> list[Activity]:
    """Activities in order of their start. Without a GPU: torch's outermost operations instead."""
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    steps = sorted(
        (e["ts"], e["ts"] + e["dur"])
        for e in events
        if e.get("cat") == "user_annotation" and e["name"] == STEP
    )
    if not gpu:
        operations = [e for e in events if e.get("cat") == "cpu_op"]
        return [_activity(e, e["ts"], steps) for e in _outermost(operations)]
    launches: dict[Any, float] = {}
    for event in events:
        number = event.get("args", {}).get("correlation")
        if event.get("cat") in _LAUNCHES and number is not None:
            launches[number] = event["ts"]
    found = [
        _activity(e, launches.get(e.get("args", {}).get("correlation")), steps)
        for e in events
        if e.get("cat") in _ON_GPU
    ]
    return sorted(found, key=lambda activity: activity.start)


def _activity(
    event: Mapping[str, Any], launched: float | None, steps: Sequence[tuple[float, float]]
) -> Activity:
    step = None
    if launched is not None:
        at = bisect_right(steps, (launched, float("inf"))) - 1
        step = at if at >= 0 and launched <= steps[at][1] else None
    return Activity(event["name"], event["ts"], event["ts"] + event["dur"], step)


def _outermost(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    end = float("-inf")
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        if event["ts"] >= end:
            found.append(event)
            end = event["ts"] + event["dur"]
    return found


def busy_us(activities: Iterable[Activity]) -> float:
    """Time in which anything runs: what overlaps counts once."""
    total, end = 0.0, float("-inf")
    for activity in sorted(activities, key=lambda a: a.start):
        total += max(0.0, activity.end - max(activity.start, end))
        end = max(end, activity.end)
    return total


def steps_of(activities: Iterable[Activity]) -> list[list[Activity]]:
    """Those whose step is known, by step, in order."""
    found: dict[int, list[Activity]] = defaultdict(list)
    for activity in activities:
        if activity.step is not None:
            found[activity.step].append(activity)
    return [found[step] for step in sorted(found)]


def gaps_us(steps: Sequence[Sequence[Activity]]) -> list[float]:
    """Between the end of a step's last activity and the start of the next one's first; 0 if they overlap."""
    ends = [max(activity.end for activity in step) for step in steps]
    starts = [min(activity.start for activity in step) for step in steps]
    return [max(0.0, start - end) for end, start in zip(ends, starts[1:], strict=False)]


def by_group(activities: Iterable[Activity], num_steps: int, num_layers: int) -> list[dict[str, Any]]:
    """Microseconds a step and a layer of each group, its calls a step and its most expensive kernels."""
    times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for activity in activities:
        times[group_of(activity.name)][activity.name].append(activity.end - activity.start)
    rows = []
    for group, names in times.items():
        total = sum(map(sum, names.values()))
        dearest = sorted(names, key=lambda name: -sum(names[name]))[:3]
        rows.append(
            {
                "group": group,
                "us_per_step": total / num_steps,
                "us_per_layer": total / num_steps / num_layers,
                "calls_per_step": sum(map(len, names.values())) / num_steps,
                "kernels": {name[:120]: sum(names[name]) / num_steps for name in dearest},
            }
        )
    return sorted(rows, key=lambda row: -row["us_per_step"])
