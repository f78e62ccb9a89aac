"""What a step costs beside the model: scheduler, core loop and output processor, in Python.

    python benchmarks/scheduler.py --out docs/perf
    python benchmarks/scheduler.py --sweep running --steps 160 --rounds 1

An executor that answers at once stands in for the model. Every sweep changes one thing about the engine
and times decode steps; the cost should grow with the running sequences and with nothing else.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import report
from scheduler_steps import BLOCK_SIZE, PARTS, Case, Times, time_case

REPOSITORY = Path(__file__).parent.parent
TARGET_US = 300.0
SWEEPS = {
    "running": "Running sequences",
    "text": "Running sequences, with detokenization",
    "context": "Tokens per running sequence",
    "finished": "Requests finished before",
    "waiting": "Requests that wait",
    "boundaries": "When sequences need their next block",
    "shown": "What a stream shows",
    "collector": "Python's garbage collector",
}


def cases(args: argparse.Namespace) -> dict[str, list[Case]]:
    """The cases of each sweep."""
    n, has_text = args.batch, args.tokenizer is not None
    sweeps = {
        "running": [Case(r) for r in args.running],
        "text": [Case(r, text=True) for r in args.running] if has_text else [],
        "context": [Case(n, context=c) for c in args.context],
        "finished": [Case(n, finished=f) for f in args.finished],
        "waiting": [Case(n, waiting=w) for w in args.waiting],
        "boundaries": [Case(n, aligned=aligned) for aligned in (False, True)],
        "shown": [
            Case(n, shown=s, text=t)
            for t in (False, True)[: 1 + has_text]
            for s in ("final", "delta", "cumulative")
        ],
        "collector": [Case(n, collector=c) for c in ("on", "frozen", "off")],
    }
    return {name: sweeps[name] for name in args.sweep if sweeps[name]}


def _label(sweep: str, case: Case) -> str:
    labels = {
        "running": f"{case.running:,}",
        "context": f"{case.context:,}",
        "finished": f"{case.finished:,}",
        "waiting": f"{case.waiting:,}",
        "boundaries": "all in one step" if case.aligned else f"1 in {BLOCK_SIZE} each step",
        "shown": case.shown + (", text" if case.text else ""),
        "collector": case.collector,
    }
    return labels["running" if sweep == "text" else sweep]


def run(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Time every case, in rounds, so that a slow minute of the machine does not fall on one case."""
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer is not None else None
    planned = {case: Times() for sweep in cases(args).values() for case in sweep}
    for number in range(args.rounds):
        for case, times in planned.items():
            times.extend(time_case(case, args.steps, args.warmup, tokenizer))
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr)
    return {
        sweep: [
            {"label": _label(sweep, case), "case": asdict(case), "us": planned[case].summary()}
            for case in entries
        ]
        for sweep, entries in cases(args).items()
    }


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a GGUF, or of a directory in Hugging Face's form."""
    if path.suffix == ".gguf":
        from halimede.engine.loader.gguf_tokenizer import load_gguf_tokenizer

        return load_gguf_tokenizer(path)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def tables(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The Markdown of all sweeps."""
    parts = [
        "Microseconds per step. `schedule` and `update` are the scheduler, `loop` the rest of "
        "`EngineCore.step` without the executor, `output` the output processor: medians over all steps. "
        "`scheduler` is the sum of the first two, `step` of all four; the mean includes block boundaries "
        "and garbage collections."
    ]
    header = ["", *PARTS, "scheduler", "mean", "p99", "step", "mean", "p90", "p99", "min", "step / sequence"]
    for sweep, entries in results.items():
        rows = []
        for entry in entries:
            us, running = entry["us"], entry["case"]["running"]
            engine, step = us["engine"], us["step"]
            row = [entry["label"], *(us[name]["median"] for name in PARTS)]
            row += [engine[name] for name in ("median", "mean", "p99")]
            row += [step[name] for name in ("median", "mean", "p90", "p99", "min")]
            rows.append([*row, step["median"] / running])
        parts += [f"## {SWEEPS[sweep]}", report.table(header, rows)]
    return parts


def plots(results: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Lines over running sequences, and how flat the others are."""
    for sweep in ("running", "text"):
        if sweep not in results:
            continue
        lines = {
            name: [(e["case"]["running"], e["us"][name]["median"]) for e in results[sweep]]
            for name in (*PARTS, "engine", "step")
        }
        title = f"Host time of a decode step: {SWEEPS[sweep].lower()}"
        path = out / f"scheduler-{sweep}.png"
        report.write_plot(path, title, "running sequences", "µs (median)", lines, log="xy", target=TARGET_US)
    flat = {
        SWEEPS[sweep]: [(float(i), e["us"]["step"]["median"]) for i, e in enumerate(results[sweep])]
        for sweep in ("context", "finished", "waiting")
        if sweep in results
    }
    if flat:
        title = "What a step should not depend on"
        report.write_plot(
            out / "scheduler-flat.png",
            title,
            "case, smallest first",
            "µs per step (median)",
            flat,
            target=TARGET_US,
        )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line; the default sizes take two or three minutes."""
    default_tokenizer = REPOSITORY / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=REPOSITORY / "docs" / "perf",
        help="directory for JSON, Markdown and plots",
    )
    add("--sweep", nargs="+", choices=list(SWEEPS), default=list(SWEEPS), help="what to vary")
    add("--running", nargs="+", type=int, default=[1, 8, 32, 64, 128, 256, 512, 1024], help="batch sizes")
    add("--batch", type=int, default=256, help="running sequences in the other sweeps")
    add("--context", nargs="+", type=int, default=[128, 1024, 8192, 32768], help="tokens per sequence")
    add("--finished", nargs="+", type=int, default=[0, 10_000, 100_000], help="requests finished before")
    add("--waiting", nargs="+", type=int, default=[0, 10_000], help="requests that wait")
    add("--steps", type=int, default=20 * BLOCK_SIZE, help="timed steps per case and round")
    add("--warmup", type=int, default=2 * BLOCK_SIZE, help="steps before them")
    add("--rounds", type=int, default=3, help="times that every case is run")
    add("--tokenizer", type=Path, default=default_tokenizer if default_tokenizer.exists() else None,
        help="GGUF or directory of a tokenizer; without one there are no rows with text")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print the tables and write the files."""
    args = parse(argv)
    results = run(args)
    env = report.environment("tokenizers")
    command = report.command_line("benchmarks/scheduler.py", sys.argv[1:] if argv is None else argv)
    parts = tables(results)
    print("\n\n".join(parts))
    settings = {name: getattr(args, name) for name in ("steps", "warmup", "rounds")}
    report.write_json(
        args.out / "scheduler.json",
        {"environment": env, "command": command, "settings": settings, "sweeps": results},
    )
    title = "Host cost of a step"
    report.write_markdown(args.out / "scheduler.md", title, command, env, parts)
    if report.has_plots():
        plots(results, args.out)
    else:
        print("no plots: pip install matplotlib", file=sys.stderr)


if __name__ == "__main__":
    main()
