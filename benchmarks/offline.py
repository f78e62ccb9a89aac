"""Halimede beside other engines: load, time to first token, throughput, prefill and memory, in one table.

    python benchmarks/offline.py
    python benchmarks/offline.py --repeats 5 --llamacpp-python PYTHON --vllm-python PYTHON

Each engine is a process of its own; they take turns cell by cell, and those that wait are stopped, so that a
slow minute of the machine falls on all of them. Greedy, the end-of-sequence token ignored, prefix caches off.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import engine_choice
import machine
import offline_report
import workload
from engine_process import EngineError, EngineProcess, EngineSpec
from workload import Workload

REPOSITORY = Path(__file__).parent.parent
Samples = dict[str, list[float]]


class Runner:
    """Starts the engines, measures every cell in turns, and keeps all samples."""

    def __init__(self, specs: Sequence[EngineSpec], work: Workload) -> None:
        self.samples: dict[str, Samples] = {spec.name: {} for spec in specs}
        self.facts: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}
        self.first_tokens: dict[str, list[list[int]]] = {}
        self._specs, self._work = list(specs), work

    def run(self, repeats: int, load_repeats: int) -> None:
        """All rounds of all cells."""
        for round_number in range(load_repeats - 1):
            for spec in self._in_turn(round_number):
                if not spec.slow_start:
                    with self._guarded(spec):
                        self._start(spec).close()
        with ExitStack() as stack:
            running: dict[str, EngineProcess] = {}
            for spec in self._in_turn(load_repeats - 1):
                with self._guarded(spec):
                    running[spec.name] = self._start(spec)
                    stack.callback(running[spec.name].close)
            for spec in self._in_turn(0):
                with self._guarded(spec):
                    self._warm_up(running[spec.name])
            for round_number in range(repeats):
                self._round(running, round_number)
                say(f"round {round_number + 1} of {repeats} done")
            for spec in self._in_turn(0):
                with self._guarded(spec), running[spec.name].awake():
                    self._note(spec, "peak_mib", running[spec.name].peak_mib())

    def _in_turn(self, round_number: int) -> list[EngineSpec]:
        """The engines that work, each round beginning with another one."""
        alive = [spec for spec in self._specs if spec.name not in self.failed]
        first = round_number % len(alive) if alive else 0
        return alive[first:] + alive[:first]

    @contextmanager
    def _guarded(self, spec: EngineSpec) -> Iterator[None]:
        """An engine that fails is left out from then on; its traceback goes to the report."""
        try:
            yield
        except EngineError as error:
            say(f"{error}\n{spec.name} is left out")
            self.failed[spec.name] = str(error).splitlines()[0]

    def _note(self, spec: EngineSpec, cell: str, value: float) -> None:
        self.samples[spec.name].setdefault(cell, []).append(value)

    def _start(self, spec: EngineSpec) -> EngineProcess:
        process = EngineProcess(spec)
        self.facts[spec.name] = process.facts
        self._note(spec, "load_s", process.load_s)
        self._note(spec, "model_s", process.facts["model_s"])
        say(f"{spec.name} loaded in {process.load_s:.1f} s")
        return process

    def _warm_up(self, process: EngineProcess) -> None:
        """Every shape once, and what the engine answers, for a comparison."""
        with process.awake():
            for size in self._work.batches:
                process.generate(self._work.prompts[:size], 4)
            process.generate([self._work.prefill], 1)
            _, ids = process.generate(self._work.prompts, self._work.new_tokens, want_ids=True)
            self.first_tokens[process.spec.name] = ids or []

    def _round(self, running: dict[str, EngineProcess], round_number: int) -> None:
        work = self._work
        one = work.prompts[:1]
        cells = [("ttft_s", one, 1), ("prefill_s", [work.prefill], 1)]
        cells += [(f"batch_{size}", work.prompts[:size], work.new_tokens) for size in work.batches]
        for cell, prompts, new_tokens in cells:
            for spec in self._in_turn(round_number):
                with self._guarded(spec), running[spec.name].awake():
                    running[spec.name].generate(one, 1)  # out of its sleep
                    seconds, _ = running[spec.name].generate(prompts, new_tokens)
                    is_rate = cell.startswith("batch_")
                    self._note(spec, cell, len(prompts) * new_tokens / seconds if is_rate else seconds)


def say(text: str) -> None:
    """Progress goes to standard error."""
    print(text, file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    engine_choice.add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the tables have medians (default: 3)")
    parser.add_argument(
        "--load-repeats", type=int, default=3, help="starts of each engine (default: 3; vLLM 1)"
    )
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "perf", help="where the files go")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write offline.json, offline.md and offline.png."""
    args = parse(argv)
    specs = engine_choice.make_specs(args, prefix_cache=False)
    model = Path(specs[0].options["model"]) if args.model is None else args.model
    work = workload.build(model, quick=args.quick)
    before = machine.calibrate(args.threads, 0.4 if args.quick else 4.0)
    for doubt in machine.doubts(before, before):
        say(f"warning: {doubt}")
    runner = Runner(specs, work)
    start = time.perf_counter()
    runner.run(args.repeats, args.load_repeats)
    say(f"measured for {time.perf_counter() - start:.0f} s")
    after = before if args.quick else machine.calibrate(args.threads, 4.0)
    result = offline_report.Result(
        model=model.name,
        work=work,
        samples=runner.samples,
        facts=runner.facts,
        failed=runner.failed,
        tokens=runner.first_tokens,
        calibration=(before, after),
        settings={
            n: getattr(args, n) for n in ("quick", "repeats", "load_repeats", "threads", "dtype", "kv_tokens")
        },
    )
    offline_report.write(result, args.out, sys.argv[1:] if argv is None else argv)
    if runner.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
