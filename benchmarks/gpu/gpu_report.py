"""Puts what the stages wrote into report.json, report.md and plots, and prints the figures that have an aim.

PYTHONPATH=src:benchmarks python benchmarks/gpu/gpu_report.py --output OUTDIR/report.json
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rehearsal import REHEARSAL
from report import has_plots, number, table, write_plot
from report_tables import STAGE_NAMES, Found, aim_rows, stage_parts, stage_rows
from stage import Results, stage_arguments

PLOTS = ("decode.png", "kernels.png")
_SHOWN_KERNELS = 40


def read_all(folder: Path) -> dict[str, dict[str, Any]]:
    """What each stage wrote, as far as it came."""
    found = {}
    for name in STAGE_NAMES:
        try:
            found[name] = json.loads((folder / f"{name}.json").read_text())
        except (OSError, ValueError):
            continue
    return found


def read_record(folder: Path) -> dict[str, Any]:
    """What run_stages.py noted of the stages that are over."""
    try:
        record: dict[str, Any] = json.loads((folder / "stages.json").read_text())
    except (OSError, ValueError):
        return {"stages": []}
    return record


def write_markdown(
    path: Path, machine: Mapping[str, Any], record: Mapping[str, Any], found: Found, plots: list[str]
) -> None:
    facts = {**machine, "commit": record.get("commit"), "nvidia-smi": record.get("nvidia_smi")}
    rehearsal = [f"**{REHEARSAL}**"] if record.get("rehearsal") else []
    parts = [
        "# GPU check",
        *rehearsal,
        "; ".join(f"{name} {value}" for name, value in facts.items() if value is not None),
        "## Aims",
        "For Llama-3-8B on an H200, in bfloat16 where nothing else is said; on another card only the shares "
        "of the roofline compare.",
        table(("", "measured", "aim", "unit", ""), aim_rows(found)),
        "## Stages",
        table(("stage", "", "seconds"), stage_rows(record["stages"], found)),
        *[f"![{Path(plot).stem}]({plot})" for plot in plots],
    ]
    for name, data in found.items():
        parts += stage_parts(name, data)
    path.write_text("\n\n".join(parts) + "\n")


def write_plots(folder: Path, found: Found, title: str) -> list[str]:
    """The names of the files."""
    written = []
    series: dict[str, list[tuple[float, float]]] = {}
    for stage, suffix in (("serving", ""), ("serving_eager", ", without graphs")):
        for row in sorted(found.get(stage, {}).get("rows", ()), key=lambda row: row["batch"]):
            if "skipped" not in row:
                name = f"context {row['context']}"
                series.setdefault(name + suffix, []).append((row["batch"], row["tok_s"]))
                if not suffix:
                    series.setdefault(f"roofline, {name}", []).append((row["batch"], row["roofline_tok_s"]))
    for row in found.get("transformers_generate", {}).get("rows", ()):
        if row["decode_tok_s"]:
            name = f"transformers, context {row['context']}"
            series.setdefault(name, []).append((row["batch"], row["decode_tok_s"]))
    if series:
        write_plot(folder / PLOTS[0], f"Decoding{title}", "batch", "tok/s", series, log="xy")
        written.append(PLOTS[0])
    rows = found.get("kernels", {}).get("rows", ())
    if rows:
        draw_kernels(folder / PLOTS[1], rows[:_SHOWN_KERNELS], f"Share of the card's ceiling{title}")
        written.append(PLOTS[1])
    return written


def draw_kernels(path: Path, rows: list[Mapping[str, Any]], title: str) -> None:
    """A bar for each call: its share of the copy or of the matrix product, whichever bounds it."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    labels = [f"{row['group']}: {row['name']}" for row in rows]
    figure, axes = pyplot.subplots(figsize=(10, 0.6 + 0.24 * len(rows)), layout="constrained")
    axes.barh(range(len(rows)), [100 * row["of_roofline"] for row in rows], color="#1f6feb")
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(100, color="grey", linestyle="--", linewidth=1)
    axes.set(title=title, xlabel="%")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def print_summary(record: Mapping[str, Any], found: Found) -> None:
    """The short table that the whole check ends with."""
    if record.get("rehearsal"):
        print(REHEARSAL)
    print(f"commit {record.get('commit') or 'unknown'}")
    for name, state, seconds in stage_rows(record["stages"], found):
        print(f"  {name:<24}{seconds:>7} s  {state}")
    for name, value, aim, unit, state in aim_rows(found):
        shown = "-" if not isinstance(value, float) else number(value)
        print(f"  {name:<36}{shown:>10} {unit:<13} aim {number(float(str(aim))):>7}  {state}")


def main() -> int:
    options = stage_arguments(__doc__).parse_args()
    device, folder = torch.device(options.device), options.output.parent
    found, record = read_all(folder), read_record(folder)
    results = Results(options.output, device, **{k: v for k, v in record.items() if k != "rehearsal"})
    for name, data in found.items():
        results.put(name, data)
    plots: list[str] = []
    for name in PLOTS:
        (folder / name).unlink(missing_ok=True)  # of an earlier run
    if has_plots():
        with results.attempt("plots"):
            plots = write_plots(folder, found, f" ({REHEARSAL})" if results.rehearsal else "")
    else:
        results.note("no plots: matplotlib is not installed")
    with results.attempt("report.md"):
        write_markdown(folder / "report.md", results.data["machine"], record, found, plots)
    print_summary(record, found)
    return results.status


if __name__ == "__main__":
    raise SystemExit(main())
