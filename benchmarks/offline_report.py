"""The tables, plots and raw numbers of offline.py."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import engine_choice
import machine
import report
from workload import Workload

Samples = Mapping[str, Sequence[float]]
_TO = "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """One column. head: its title in tables, panel: in plots."""

    name: str
    head: str
    panel: str
    more_is_better: bool = False


@dataclass(frozen=True)
class Result:
    """What was measured. calibration: before and after. tokens: of the largest batch, per engine."""

    model: str
    work: Workload
    samples: Mapping[str, Samples]
    facts: Mapping[str, Mapping[str, Any]]
    failed: Mapping[str, str]
    tokens: Mapping[str, Sequence[Sequence[int]]]
    calibration: tuple[Mapping[str, Any], Mapping[str, Any]]
    settings: Mapping[str, Any]

    def engines(self) -> list[str]:
        """The engines that finished, in the order of the command line."""
        return [name for name in self.samples if name not in self.failed]

    def cells(self) -> list[Cell]:
        """The columns."""
        prefill = f"{len(self.work.prefill):,}-token prefill"
        return [
            Cell("load_s", "load s", "Start of process to ready (s)"),
            Cell("ttft_s", "TTFT s", "Time to first token, batch 1 (s)"),
            *(
                Cell(f"batch_{size}", f"batch {size} tok/s", f"Batch {size} (output tok/s)", True)
                for size in self.work.batches
            ),
            Cell("prefill_s", f"{prefill} s", f"{prefill[0].upper()}{prefill[1:]} (s)"),
            Cell("peak_mib", "peak MiB", "Peak memory (MiB)"),
        ]


def write(result: Result, out: Path, arguments: Sequence[str]) -> None:
    """Print the tables; write offline.json, offline.md and, with matplotlib, offline.png."""
    command = report.command_line("benchmarks/offline.py", arguments)
    env = report.environment()
    parts = _parts(result)
    print("\n\n".join(parts))
    report.write_json(out / "offline.json", {"command": command, "environment": env, **_raw(result)})
    title = f"Offline speed beside other engines: {result.model}"
    plot = out / "offline.png"
    if report.has_plots():
        _plot(result, plot)
        parts.insert(1, f"![Bars of every cell]({plot.name})")
    report.write_markdown(out / "offline.md", title, command, env, parts)


def _raw(result: Result) -> dict[str, Any]:
    before, after = result.calibration
    return {
        "model": result.model,
        "settings": result.settings,
        "workload": result.work.describe(),
        "samples": result.samples,
        "engines": {
            name: {key: facts[key] for key in facts if key not in ("import_s", "model_s")}
            for name, facts in result.facts.items()
        },
        "failed": result.failed,
        "equal_first_tokens": _agreement(result),
        "machine": {"before": before, "after": after, "doubts": machine.doubts(before, after)},
    }


def _parts(result: Result) -> list[str]:
    engines, cells = result.engines(), result.cells()
    tokens = [sum(map(len, result.work.prompts[:size])) for size in result.work.batches]
    settings, work = result.settings, result.work
    parts = [
        f"Medians (lowest{_TO}highest) of {settings['repeats']} rounds in which the engines took turns. "
        f"Greedy, {work.new_tokens} new tokens per prompt, end of sequence ignored, prefix caches off, "
        f"{settings['threads']} threads, {settings['dtype']} where Details do not say otherwise. "
        f"Batches of {', '.join(map(str, work.batches))} chats have {', '.join(f'{n:,}' for n in tokens)} "
        f"prompt tokens and are timed with their prefill: "
        f"output tokens over the whole time. TTFT is a request for one token with the "
        f"{len(work.prompts[0])}-token prompt. Load counts from the start of the process, imports included. "
        "Peak is resident memory, all of the engine's processes together.",
        report.table(
            ["", *(cell.head for cell in cells)],
            [[name, *(_spread(result.samples[name].get(c.name)) for c in cells)] for name in engines],
        ),
        *_comparison(result),
        "## Details",
        report.table(
            ["", "dtype", "load without imports s", "KV cache MiB", "equal first tokens", "versions"],
            [_details(result, name) for name in engines],
        ),
        "Equal first tokens: how many tokens each answer of the largest batch has in common with Halimede's "
        "before the first difference (median; rounding in 16 bits makes engines part after some tokens).",
    ]
    parts += [f"{name} failed: {reason}" for name, reason in result.failed.items()]
    if settings["quick"]:
        parts.insert(0, engine_choice.QUICK_NOTE)
    return [*parts, "## Machine", *_machine(result)]


def _spread(values: Sequence[float] | None) -> str:
    """Median (lowest–highest)."""
    if not values:
        return ""
    middle = report.number(median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({report.number(min(values))}{_TO}{report.number(max(values))})"


def _comparison(result: Result) -> list[str]:
    """How many times better the first engine is, cell by cell."""
    first, *others = result.engines() or [""]
    if not others:
        return []
    rows = []
    for other in others:
        row = [other]
        for cell in result.cells():
            ours, theirs = (median(result.samples[name][cell.name]) for name in (first, other))
            row.append(f"{ours / theirs if cell.more_is_better else theirs / ours:.2f}x")
        rows.append(row)
    header = [f"{first} against", *(cell.head.rsplit(" ", 1)[0] for cell in result.cells())]
    return [f"How many times better {first} is (above 1: faster, or smaller):", report.table(header, rows)]


def _details(result: Result, name: str) -> list[object]:
    facts = result.facts[name]
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    # llama.cpp says "CPU : AVX = 1 | AVX2 = 1 | ...": what its code was compiled for.
    build = [
        part.split()[-3] for part in facts.get("build", "").split("|") if part.split()[-2:] == ["=", "1"]
    ]
    kv_cache, equal = facts.get("kv_cache_mib"), _agreement(result).get(name)
    return [
        name,
        facts.get("settings", {}).get("dtype"),
        _spread(result.samples[name]["model_s"]),
        kv_cache,
        equal,
        versions + (f" ({' '.join(build)})" if build else ""),
    ]


def _agreement(result: Result) -> dict[str, float]:
    """Median length of what each engine's answers have in common with the first engine's."""
    engines = [name for name in result.engines() if result.tokens.get(name)]
    if not engines:
        return {}
    reference = result.tokens[engines[0]]
    return {
        name: median(_common(a, b) for a, b in zip(reference, result.tokens[name], strict=True))
        for name in engines
    }


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=True))
    return next((at for at, (a, b) in pairs if a != b), len(first))


def _machine(result: Result) -> list[str]:
    before, after = result.calibration
    rows = [[name.replace("_", " "), before[name], after[name]] for name in before]
    doubts = machine.doubts(before, after)
    found = ["Not a quiet run: " + "; ".join(doubts) + "."] if doubts else ["The machine was quiet."]
    return [report.table([platform.machine(), "before", "after"], rows), *found]


def _plot(result: Result, path: Path) -> None:
    panels = [
        report.Panel(
            cell.panel,
            {name: result.samples[name].get(cell.name, []) for name in result.engines()},
            "more is better" if cell.more_is_better else "less is better",
        )
        for cell in result.cells()
    ]
    threads, dtype = result.settings["threads"], result.settings["dtype"]
    title = f"{result.model}, {threads} CPU threads, {dtype} where not named: median, lowest and highest"
    report.write_bars(path, title, panels)
