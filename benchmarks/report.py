"""What every benchmark writes: NAME.json with all numbers, NAME.md with tables, NAME-*.png with plots."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Series = Mapping[str, Sequence[tuple[float, float]]]
"""Lines of a plot: label to its points."""


def environment(*packages: str) -> dict[str, str | int | None]:
    """Where the numbers come from: processor, Python, versions of the named packages, the commit, the day."""
    found: dict[str, str | int | None] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str | None:
    """The commit, with "+" when the tree has changes; None outside a repository."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=here, capture_output=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed.strip() else "")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; floats with three significant digits, and all of them from 100 on."""
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
    return number(value)


def number(value: float) -> str:
    """Three significant digits, and all of them from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def command_line(script: str, arguments: Sequence[str]) -> str:
    """The command as a reader would type it: of an absolute path only the name is kept."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in arguments]
    return shlex.join(["python", script, *words])


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write numbers so that two runs can be compared line by line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


def write_markdown(
    path: Path, title: str, command: str, env: Mapping[str, Any], parts: Iterable[str]
) -> None:
    """Write title, command and environment, then the parts (paragraphs, tables) in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    where = "; ".join(f"{name} {value}" for name, value in env.items() if value is not None)
    path.write_text("\n\n".join([f"# {title}", f"`{command}`", where, *parts]) + "\n")


def has_plots() -> bool:
    """Whether matplotlib is there: `pip install matplotlib`."""
    return importlib.util.find_spec("matplotlib") is not None


def write_plot(
    path: Path,
    title: str,
    x_label: str,
    y_label: str,
    series: Series,
    *,
    log: str = "",
    target: float | None = None,
) -> None:
    """Write a plot of lines. log: logarithmic axes ("", "x", "y", "xy"). target: a line to stay under."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for label, points in series.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
    if target is not None:
        axes.axhline(target, color="grey", linestyle="--", linewidth=1, label=f"target {target:g}")
    if "x" in log:
        axes.set_xscale("log", base=2)
    if "y" in log:
        axes.set_yscale("log")
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


@dataclass(frozen=True)
class Panel:
    """One part of a plot of bars: label to its samples."""

    title: str
    samples: Mapping[str, Sequence[float]]
    note: str = ""


def write_bars(path: Path, title: str, panels: Sequence[Panel], columns: int = 2) -> None:
    """Write horizontal bars of medians with whiskers from the lowest to the highest sample, a panel each.

    A label has the same colour in all panels; the first one is ours and stands out.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    labels = list(dict.fromkeys(label for panel in panels for label in panel.samples))
    colours = {label: "#1f6feb" if label == labels[0] else "#9aa5b1" for label in labels}
    rows = -(-len(panels) // columns)
    height = rows * (0.75 + 0.3 * len(labels)) + 0.4
    figure, grid = pyplot.subplots(rows, columns, figsize=(9, height), layout="constrained", squeeze=False)
    figure.suptitle(title, fontsize=11)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw_bars(axes, panel, colours)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_bars(axes: Any, panel: Panel, colours: Mapping[str, str]) -> None:
    shown = {label: values for label, values in panel.samples.items() if values}
    middles = [statistics.median(values) for values in shown.values()]
    whiskers = [
        [middle - min(values) for middle, values in zip(middles, shown.values(), strict=True)],
        [max(values) - middle for middle, values in zip(middles, shown.values(), strict=True)],
    ]
    style = {"ecolor": "#30363d", "elinewidth": 1.2, "capsize": 2.5}
    axes.barh(
        list(shown),
        middles,
        height=0.7,
        xerr=whiskers,
        color=[colours[label] for label in shown],
        error_kw=style,
    )
    most = max((max(values) for values in shown.values()), default=1.0)
    for row, (label, values) in enumerate(shown.items()):
        weight = "bold" if label == next(iter(colours)) else "normal"
        axes.text(
            max(values) + 0.02 * most, row, number(middles[row]), va="center", fontsize=9, weight=weight
        )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * most)
    axes.set_title(f"{panel.title}", fontsize=10, loc="left", weight="bold")
    axes.set_title(panel.note, fontsize=8, loc="right", color="#57606a")
    axes.tick_params(labelsize=9)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
