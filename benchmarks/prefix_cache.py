"""What the prefix cache saves: time to the first token with it and without it.

    python benchmarks/prefix_cache.py
    python benchmarks/prefix_cache.py --context 512 1024 4096 --vllm-python PYTHON

Shared prefix: requests one after the other with the same long system prompt and a question each. Second turn:
a conversation goes on after an answer. Each round has texts of its own, so its first request is a cold one.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import engine_choice
import machine
import report
import workload
from engine_process import EngineProcess, EngineSpec

REPOSITORY = Path(__file__).parent.parent
TARGET = 0.2  # of the first turn's time, at 1,024 tokens of context
QUESTION_TOKENS = 24


@dataclass(frozen=True)
class Row:
    """Samples of one engine at one length of context, in seconds to the first token.

    first, later: requests with a shared prefix; first_turn, second_turn: of a conversation.
    """

    engine: str
    cache: bool
    context: int
    first: list[float]
    later: list[float]
    first_turn: list[float]
    second_turn: list[float]


class Texts:
    """Token ids of contexts, questions and turns, none of them used twice."""

    def __init__(self, directory: Path) -> None:
        self._tokenizer = workload.open_tokenizer(directory)
        self._used = 0

    def next(self, count: int) -> list[int]:
        """`count` tokens that begin with a number that has not been there."""
        self._used += 1
        head = self._tokenizer.encode(f"Part {self._used}: ", add_special_tokens=False)
        return [*head, *workload.running_text(self._tokenizer, count, 37 * self._used)][:count]


def first_token_s(process: EngineProcess, prompt: list[int]) -> float:
    """Seconds of a request for one token."""
    return process.generate([prompt], 1)[0]


def run_round(process: EngineProcess, texts: Texts, row: Row, requests: int, answer_tokens: int) -> None:
    """Add one round's samples to `row`."""
    with process.awake():
        first_token_s(process, texts.next(QUESTION_TOKENS))  # out of its sleep
        prefix = texts.next(row.context)
        seconds = [first_token_s(process, prefix + texts.next(QUESTION_TOKENS)) for _ in range(requests)]
        row.first.append(seconds[0])
        row.later.extend(seconds[1:])
        turn = texts.next(row.context)
        row.first_turn.append(first_token_s(process, turn))
        _, answers = process.generate([turn], answer_tokens, want_ids=True)
        assert answers is not None
        row.second_turn.append(first_token_s(process, turn + answers[0] + texts.next(QUESTION_TOKENS)))


def measure(args: argparse.Namespace) -> tuple[list[Row], str]:
    """All rounds of all engines, cache on and off, and the model's name."""
    specs = list(_specs(args))
    model = Path(specs[0].options["model"]) if args.model is None else args.model
    texts = Texts(model)
    with ExitStack() as stack:
        running = []
        for spec in specs:
            process = EngineProcess(spec)
            stack.callback(process.close)
            running.append(process)
        rows = {
            (process.spec.name, context): _row(process.spec, context)
            for context in args.context
            for process in running
        }
        for process in running:  # warm up: every shape once
            for context in args.context:
                run_round(process, texts, _row(process.spec, context), 2, args.answer_tokens)
        for number in range(args.repeats):
            for context in args.context:
                for process in running:
                    row = rows[process.spec.name, context]
                    run_round(process, texts, row, args.requests, args.answer_tokens)
            print(f"round {number + 1} of {args.repeats} done", file=sys.stderr)
    return list(rows.values()), model.name


def _row(spec: EngineSpec, context: int) -> Row:
    return Row(spec.name, bool(spec.options["prefix_cache"]), context, [], [], [], [])


def _specs(args: argparse.Namespace) -> Iterator[EngineSpec]:
    for cache in (False, True):
        for spec in engine_choice.make_specs(args, prefix_cache=cache):
            if spec.script != "transformers_worker.py":  # it has no prefix cache
                yield replace(spec, name=f"{spec.name}, cache {'on' if cache else 'off'}")


def tables(rows: Sequence[Row]) -> list[str]:
    """The Markdown."""
    table = [
        [
            row.engine,
            row.context,
            *(1e3 * median(values) for values in (row.first, row.later, row.first_turn, row.second_turn)),
            f"{100 * median(row.later) / median(row.first):.0f} %",
            f"{100 * second_turn_share(row):.0f} %",
        ]
        for row in rows
    ]
    header = ["", "context tokens", "first request", "later requests", "first turn", "second turn"]
    header += ["later / first", "second / first turn"]
    return [
        "Medians of the milliseconds to the first token of one request at a time. Later requests share the "
        f"context with the first one and end in {QUESTION_TOKENS} tokens of their own; the second turn adds "
        f"the answer to the first one and {QUESTION_TOKENS} tokens.",
        report.table(header, table),
        f"Aim: at 1,024 tokens the second turn takes at most {100 * TARGET:.0f} % of the first.",
    ]


def second_turn_share(row: Row) -> float:
    """Time to the first token of the second turn as a share of the first turn's."""
    return median(row.second_turn) / median(row.first_turn)


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Bars of the longest context."""
    longest = max(row.context for row in rows)
    names = {
        "first": "First request (ms)",
        "later": "Later requests (ms)",
        "first_turn": "First turn (ms)",
        "second_turn": "Second turn (ms)",
    }
    shown = [row for row in rows if row.context == longest]
    shown.sort(key=lambda row: not row.cache)
    panels = [
        report.Panel(
            label, {row.engine: [1e3 * s for s in getattr(row, name)] for row in shown}, "less is better"
        )
        for name, label in names.items()
    ]
    report.write_bars(path, f"Time to first token with {longest:,} tokens of context: {title}", panels)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    engine_choice.add_arguments(parser)
    add = parser.add_argument
    add("--context", type=int, nargs="+", default=[256, 1024], help="tokens of context (default: 256 1024)")
    add("--requests", type=int, default=6, help="requests that share a context (default: 6)")
    add("--answer-tokens", type=int, default=32, help="tokens of the first turn's answer (default: 32)")
    add("--repeats", type=int, default=5, help="rounds; the table has medians (default: 5)")
    add("--out", type=Path, default=REPOSITORY / "docs" / "perf", help="where the files go")
    args = parser.parse_args(argv)
    if args.quick:
        args.context, args.requests, args.answer_tokens = [64], 2, 2
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write prefix_cache.json, prefix_cache.md and prefix_cache.png."""
    args = parse(argv)
    before = machine.calibrate(args.threads, 0.4 if args.quick else 4.0)
    rows, model = measure(args)
    after = before if args.quick else machine.calibrate(args.threads, 4.0)
    doubts = machine.doubts(before, after)
    parts = tables(rows)
    if args.quick:
        parts.insert(0, engine_choice.QUICK_NOTE)
    parts.append("Not a quiet run: " + "; ".join(doubts) + "." if doubts else "The machine was quiet.")
    print("\n\n".join(parts))
    command = report.command_line("benchmarks/prefix_cache.py", sys.argv[1:] if argv is None else argv)
    env = report.environment("torch", "transformers")
    names = ("threads", "dtype", "requests", "answer_tokens", "repeats", "kv_tokens")
    raw: dict[str, Any] = {
        "model": model,
        "settings": {name: getattr(args, name) for name in names},
        "rows": [{**vars(row), "second_turn_share": second_turn_share(row)} for row in rows],
        "machine": {"before": before, "after": after, "doubts": doubts},
    }
    report.write_json(args.out / "prefix_cache.json", {"command": command, "environment": env, **raw})
    if report.has_plots():
        plot(rows, f"{model}, {args.threads} CPU threads, {args.dtype}", args.out / "prefix_cache.png")
        parts.insert(1, "![Bars of the times to the first token](prefix_cache.png)")
    report.write_markdown(args.out / "prefix_cache.md", f"Prefix cache: {model}", command, env, parts)


if __name__ == "__main__":
    main()
