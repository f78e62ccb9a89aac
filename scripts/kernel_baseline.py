"""Compiles kernels for every target and writes their baseline for the running Triton; says what changed.

    .venv/bin/python scripts/kernel_baseline.py [KERNEL]   # compiles what the baseline does not have
    .venv/bin/python scripts/kernel_baseline.py --all      # compiles everything
    .venv/bin/python scripts/kernel_baseline.py --check    # compiles everything, writes nothing

Another Triton: PYTHONPATH=.venv/triton-3.6 in front. Exit status 1 also when a rule of kernels/gate.py is
broken; the baseline is written all the same.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from halimede.kernels.gate import (
    Baseline,
    Findings,
    Line,
    Numbers,
    baseline_path,
    examine,
    read_baseline,
    write_baseline,
)
from halimede.kernels.spec import all_kernels
from halimede.kernels.target import TARGETS

FOLDER = Path(__file__).parent.parent / "tests/kernels/baselines"


def examine_one(task: tuple[str, str, Baseline | None, bool]) -> Findings:
    """A kernel's name, a target's, the baseline, and whether to compile everything."""
    kernel, target, baseline, everything = task
    return examine(all_kernels()[kernel], TARGETS[target], baseline, everything=everything)


def changes(old: Baseline, new: Baseline) -> list[str]:
    """A line for each build that came, went or has other numbers."""
    lines = [f"new   {name}" for name in sorted(new.keys() - old.keys())]
    lines += [f"gone  {name}" for name in sorted(old.keys() - new.keys())]
    for name in sorted(old.keys() & new.keys()):
        differing = _differences(old[name], new[name])
        if differing:
            lines.append(f"      {name}: {differing}")
    return lines


def _differences(old: Line, new: Line) -> str:
    pairs = [(f.name, getattr(old.numbers, f.name), getattr(new.numbers, f.name)) for f in fields(Numbers)]
    return ", ".join(f"{name} {before} -> {now}" for name, before, now in pairs if before != now)


def examine_all(kernels: Sequence[str], old: Baseline, *, everything: bool, jobs: int) -> list[Findings]:
    """Of each kernel on each target, in several processes with a cache of their own."""
    tasks = [(kernel, target, old, everything) for kernel in kernels for target in TARGETS]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        # Not forked: Triton's compiler has threads.
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            return pool.map(examine_one, tasks, chunksize=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="only these (default: all)")
    parser.add_argument("--all", action="store_true", help="compile also what the baseline has")
    parser.add_argument("--check", action="store_true", help="compile everything, write nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: the cores)")
    options = parser.parse_args(arguments)
    unknown = set(options.kernels) - all_kernels().keys()
    if unknown:
        parser.error(f"no kernels {', '.join(sorted(unknown))}; there are: {', '.join(all_kernels())}")
    kernels = options.kernels or list(all_kernels())
    path = baseline_path(FOLDER)
    old = read_baseline(path) or {}
    found = examine_all(kernels, old, everything=options.all or options.check, jobs=options.jobs)
    kept = {name: line for name, line in old.items() if name.split("|")[0] in all_kernels().keys() - kernels}
    new = kept | {name: line for findings in found for name, line in findings.lines.items()}
    problems = [problem for findings in found for problem in findings.problems]
    if options.check:
        problems += [f"{name}: not as in the baseline" for findings in found for name in findings.stale]
    print(*changes(old, new), sep="\n")
    print(*(f"problem: {problem}" for problem in problems), sep="\n", file=sys.stderr)
    if not options.check:
        write_baseline(path, new)
    compiled = sum(findings.num_compiled for findings in found)
    print(f"{path.name}: {len(new)} builds, {compiled} signatures compiled, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
