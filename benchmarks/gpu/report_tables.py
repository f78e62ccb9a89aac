"""A table for each stage, and the few lines that everything comes down to."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from report import table
from roofline import AIMED_AT, AIMS, meets
from run_stages import TIMED_OUT

Found = Mapping[str, Mapping[str, Any]]
"""What each stage has written, by its name; a stage that wrote nothing is not in it."""

Row = Sequence[object]


def stage_rows(stages: Sequence[Mapping[str, Any]], found: Found) -> list[Row]:
    """(stage, state, seconds) of each stage."""
    rows: list[Row] = []
    for stage in stages:
        data = found.get(stage["name"], {})
        failures = len(data.get("failures", ()))
        if stage["status"] == TIMED_OUT:
            state = f"stopped after {stage['limit_s']:.0f} s; what it had is below"
        elif failures:
            state = f"{failures} failures"
        else:
            state = "ok" if stage["status"] == 0 else f"exit status {stage['status']}"
        rows.append((stage["name"], state, round(stage["seconds"], 1)))
    return rows


def measured(found: Found) -> dict[str, float]:
    """Each figure that has an aim, by the aim's name."""
    figures: dict[str, float] = {}
    found = {name: data for name, data in found.items() if data.get("geometry") == AIMED_AT}
    served = {"": found.get("serving", {})}
    methods = found.get("serving_quantized", {}).get("methods", {})
    served |= {f"{name}: ": data for name, data in methods.items()}
    for prefix, data in served.items():
        for row in data.get("rows", ()):
            if "skipped" in row:
                continue
            where = f"batch {row['batch']}, context {row['context']}"
            figures[f"{prefix}decode, {where}"] = row["tok_s"]
            if "profile" in row:
                figures[f"{prefix}host gap, {where}"] = row["profile"]["host_gap_ms"]
    result = found.get("throughput", {}).get("result", {})
    rate = result.get("steady_output_tok_s") or result.get("output_tok_s")
    if rate is not None:
        figures["1,024 in, 1,024 out"] = rate
    return {name: value for name, value in figures.items() if name in AIMS}


def aim_rows(found: Found) -> list[Row]:
    figures = measured(found)
    rows: list[Row] = []
    for name, (aim, unit) in AIMS.items():
        value = figures.get(name)
        state = "not measured" if value is None else "reached" if meets(name, value) else "not reached"
        rows.append((name, None if value is None else float(value), float(aim), unit, state))
    return rows


def _parity(data: Mapping[str, Any]) -> Iterator[str]:
    rows = data.get("rows", ())
    kernels: dict[str, list[bool]] = {}
    for row in rows:
        kernels.setdefault(row["kernel"], []).append(row["equal"])
    yield table(("kernel", "cases", "equal"), [(name, len(v), sum(v)) for name, v in kernels.items()])


def _families(data: Mapping[str, Any]) -> Iterator[str]:
    header = ("family", "mode", "equal", "of", "share of best logits", "largest gap", "right")
    keys = ("family", "mode", "equal", "of", "best_share", "largest_gap")
    rows = data.get("rows", ())
    yield table(header, [[*(row[key] for key in keys), "yes" if row["right"] else "NO"] for row in rows])


def _kernel_cache(data: Mapping[str, Any]) -> Iterator[str]:
    parts = [(part, data[part]) for part in ("built", "warm", "cold") if part in data]
    rows = [
        (part, name, value) for part, values in parts for name, value in values.items() if name != "failed"
    ]
    yield table(("process", "figure", "value"), rows)


def _ceilings(data: Mapping[str, Any]) -> Iterator[str]:
    rows: list[Row] = []
    for name, unit, size in (("copy_bytes_per_s", "TB/s", 1e12), ("read_bytes_per_s", "TB/s", 1e12)):
        if name in data:
            rows.append((name.removesuffix("_bytes_per_s"), data[name] / size, unit))
    for dtype in ("bfloat16", "float16", "float8"):
        if (name := f"{dtype}_flop_per_s") in data:
            rows.append((f"product in {dtype}", data[name] / 1e12, "TFLOP/s"))
    if "launch_floor_us" in data:
        rows.append(("empty kernel in a graph", data["launch_floor_us"], "us"))
    rows += [(f"host: {name}", us, "us") for name, us in data.get("host_launch_us", {}).items()]
    yield table(("", "figure", "unit"), rows)


def _kernels(data: Mapping[str, Any]) -> Iterator[str]:
    header = ("group", "call", "us", "GB/s", "of copy", "TFLOP/s", "of product")
    rows = [
        (
            row["group"],
            row["name"],
            row["ms"] * 1e3,
            row["bytes"] / row["ms"] / 1e6,
            f"{row['of_copy']:.0%}",
            row["flops"] / row["ms"] / 1e9,
            f"{row['of_product']:.0%}",
        )
        for row in data.get("rows", ())
    ]
    yield table(header, rows)


def _serving(data: Mapping[str, Any]) -> Iterator[str]:
    header = ("batch", "context", "ms", "p99", "tok/s", "of the roofline", "GPU busy ms", "host gap ms", "")
    rows: list[Row] = []
    for row in data.get("rows", ()):
        if "skipped" in row:
            rows.append((row["batch"], row["context"], *[None] * 6, f"left out: {row['skipped']}"))
            continue
        profile = row.get("profile", {})
        gap_from = profile.get("host_gap_from")
        rows.append(
            (
                row["batch"],
                row["context"],
                row["ms"],
                row["p99_ms"],
                row["tok_s"],
                f"{row['share']:.0%}",
                profile.get("busy_ms"),
                profile.get("host_gap_ms"),
                "" if gap_from in (None, "kernels") else f"gap: {gap_from}",
            )
        )
    yield table(header, rows)
    for row in data.get("rows", ()):
        if "profile" in row:
            yield f"Kernels, batch {row['batch']}, context {row['context']}:"
            groups = row["profile"]["groups"]
            keys = ("group", "us_per_step", "us_per_layer", "calls_per_step")
            yield table(
                ("group", "us a step", "us a layer", "calls"), [[g[key] for key in keys] for g in groups]
            )


def _serving_quantized(data: Mapping[str, Any]) -> Iterator[str]:
    header = (
        "weights",
        "batch",
        "context",
        "tok/s",
        "ms",
        "of the roofline",
        "aimed at",
        "GB read",
        "start s",
    )
    rows: list[Row] = []
    for method, found in data.get("methods", {}).items():
        for row in found.get("rows", ()):
            if "skipped" in row:
                continue
            aimed = row.get("aimed_share")
            rows.append(
                (
                    method,
                    row["batch"],
                    row["context"],
                    row["tok_s"],
                    row["ms"],
                    f"{row['share']:.0%}",
                    None if aimed is None else f"{aimed:.0%}",
                    found["streamed_bytes"] / 1e9,
                    found["startup_s"],
                )
            )
    yield table(header, rows)
    yield "GB read: of weights in a step. Start: weights, KV cache, graphs."
    for method, found in data.get("methods", {}).items():
        yield f"### {method}"
        yield from _serving(found)


def _quantized_products(data: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "Microseconds of a product; ours: with activations already rounded where the kernel rounds them, and "
        "from 16 bits. x: how much faster than bfloat16 (`torch.matmul`) and than torch's own 8-bit product. "
        "Of copy: bytes of the weight as it is kept, of activations and results, at the rate of a copy."
    )
    header = ("matrix", "rows", "bfloat16", "ours", "from 16 bits", "torch", "x bfloat16", "x torch")
    rows: dict[str, list[Row]] = {}
    for row in data.get("rows", ()):
        us = row["us"]
        ours = us.get("codes", us.get("x"))
        if ours is None:
            continue
        faster = [us[name] / ours if name in us else None for name in ("bfloat16", "torch")]
        times = (us.get("bfloat16"), ours, us.get("x"), us.get("torch"))
        last = (f"{row['of_copy']:.0%}", row["flops"] / ours / 1e6)
        name = f"{row['shape']} {row['n']} x {row['k']}"
        rows.setdefault(row["kind"], []).append((name, row["rows"], *times, *faster, *last))
    for kind, those in rows.items():
        yield f"### {kind}"
        yield table((*header, "of copy", "TFLOP/s"), those)
    yield from _product_errors(data)


def _product_errors(data: Mapping[str, Any]) -> Iterator[str]:
    """The largest error of each kind, over all shapes."""
    largest: dict[tuple[str, str], float] = {}
    for row in data.get("rows", ()):
        for name, error in row["errors"].items():
            key = (row["kind"], name)
            largest[key] = max(error, largest.get(key, 0.0))
    yield "Errors, beside the product in float64: RMS of all, largest as a share of its row's RMS."
    yield table(("weights", "given", "largest of all shapes"), [(*key, v) for key, v in largest.items()])


def _generate(data: Mapping[str, Any]) -> Iterator[str]:
    keys = ("batch", "context", "new_tokens", "tok_s", "decode_tok_s", "first_token_s")
    header = ("batch", "context", "new tokens", "tok/s", "tok/s without prefill", "first token s")
    yield table(header, [[row[key] for key in keys] for row in data.get("rows", ())])


def _throughput(data: Mapping[str, Any]) -> Iterator[str]:
    rows: list[Row] = []
    for name, value in data.get("result", {}).items():
        if isinstance(value, dict):
            rows += [(f"{name} {rank}", float(figure)) for rank, figure in value.items()]
        else:
            rows.append((name, str(value) if isinstance(value, bool) else value))
    yield table(("", "value"), rows)


_PARTS = {
    "parity": _parity,
    "families": _families,
    "kernel_cache": _kernel_cache,
    "ceilings": _ceilings,
    "kernels": _kernels,
    "quantized_products": _quantized_products,
    "serving": _serving,
    "serving_quantized": _serving_quantized,
    "serving_eager": _serving,
    "transformers_generate": _generate,
    "throughput": _throughput,
}


def stage_parts(name: str, data: Mapping[str, Any]) -> list[str]:
    """The section of a stage: its notes and failures, then its tables."""
    said = [f"- {note}" for note in data.get("notes", ())]
    said += [f"- FAILED {f['what']}: {_first_line(f['error'])}" for f in data.get("failures", ())]
    heading = f"## {name}" + (f" ({data['geometry']})" if "geometry" in data else "")
    return [heading, *(["\n".join(said)] if said else []), *_PARTS[name](data)]


def _first_line(error: str) -> str:
    return error.splitlines()[0][:200] if error else ""


STAGE_NAMES = tuple(_PARTS)
