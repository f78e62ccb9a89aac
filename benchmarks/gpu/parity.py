"""Every case of every kernel on this machine's GPU against its reference: prints what differs.

PYTHONPATH=src:tests:tests/kernels python benchmarks/gpu/parity.py --output parity.json

Inputs are random, and what a kernel does not write holds NaN. Kernels are built on all cores; a case runs as
soon as its kernels are there, in a process of its own kind: where a kernel kills it, hangs or leaves the GPU
unusable, the case is named and the next ones run in a new process.
"""

import queue
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from kernels_ahead import Keyed, build, launched_by
from one_by_one import OneByOne
from parity_worker import launches, selected
from stage import Results, stage_arguments

from halimede.engine.warmup.pool import Outcome
from halimede.kernels.spec import Case, KernelSpec
from halimede.kernels.specialise import Specialisation
from halimede.kernels.target import target_of_device

CASE_S = 25.0
Chosen = Sequence[tuple[KernelSpec, Case]]


class Schedule:
    """Which cases may run: those whose kernels are all built. Those with one that cannot be built never do.

    needs: of each case, the kernels that it launches.
    """

    def __init__(self, needs: Sequence[Keyed]) -> None:
        self.ready: queue.SimpleQueue[tuple[int, str | None] | None] = queue.SimpleQueue()
        self._lacking = [set(keyed) for keyed in needs]
        self._given: set[int] = set()

    def start(self, missing: Sequence[Specialisation]) -> None:
        """missing: what is to be built."""
        keys = {one.key for one in missing}
        for index, lacking in enumerate(self._lacking):
            lacking &= keys
            if not lacking:
                self._give(index, None)

    def done(self, outcome: Outcome) -> None:
        """A kernel is built, or cannot be."""
        for index, lacking in enumerate(self._lacking):
            if outcome.specialisation.key in lacking:
                lacking.discard(outcome.specialisation.key)
                if outcome.error is not None:
                    self._give(index, f"{outcome.specialisation.name} does not build: {outcome.error}")
                elif not lacking:
                    self._give(index, None)

    def end(self) -> None:
        """Nothing more is built: what has not had its turn has it now."""
        for index in range(len(self._lacking)):
            self._give(index, None)
        self.ready.put(None)

    def _give(self, index: int, error: str | None) -> None:
        if index not in self._given:
            self._given.add(index)
            self.ready.put((index, error))


def run_ready(schedule: Schedule, chosen: Chosen, runner: OneByOne, results: Results) -> None:
    """Runs what is ready until the end. Only this writes to `results` meanwhile."""
    while (one := schedule.ready.get()) is not None:
        index, error = one
        spec, case = chosen[index]
        seconds = 0.0
        if error is None:
            try:
                answer = runner.run(index)
            except RuntimeError as problem:  # it would be so for all
                results.fail("running cases", str(problem))
                while schedule.ready.get() is not None:
                    continue
                return
            error, seconds = answer["error"], answer["seconds"]
        if error is not None:
            results.fail(f"{spec.name} ({case.name})", error)
        row = {"kernel": spec.name, "case": case.name, "seconds": seconds, "equal": error is None}
        results.add("rows", row)


def measure(results: Results, chosen: Chosen, device: torch.device, command: Sequence[str]) -> None:
    needs: list[Keyed] = [{} for _ in chosen]
    if device.type == "cuda":
        target = target_of_device(device)
        needs = [launched_by(launches(spec, case), target) for spec, case in chosen]
    schedule, runner = Schedule(needs), OneByOne(command, CASE_S)
    feeder = threading.Thread(target=run_ready, args=(schedule, chosen, runner, results), daemon=True)
    feeder.start()
    problem = None
    try:
        wanted = {key: one for keyed in needs for key, one in keyed.items()}
        build(wanted.values(), on_start=schedule.start, on_done=schedule.done, spared=1)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    finally:
        schedule.end()
        feeder.join()
        runner.close()
    if problem is not None:
        results.fail("compiling ahead", problem)


def main() -> int:
    parser = stage_arguments(__doc__)
    parser.add_argument("--only", default="", help="kernels whose name has one of these words in it")
    options = parser.parse_args()
    device = torch.device(options.device)
    results = Results(options.output, device)
    chosen = list(selected(options.only))
    worker = str(Path(__file__).with_name("parity_worker.py"))
    measure(
        results, chosen, device, [sys.executable, worker, "--device", options.device, "--only", options.only]
    )
    rows = results.data.get("rows", [])
    equal = sum(row["equal"] for row in rows)
    print(f"parity: {equal} of {len(chosen)} cases equal their reference")
    if len(rows) < len(chosen):
        results.fail("parity", f"{len(chosen) - len(rows)} cases had no turn")
    return results.status


if __name__ == "__main__":
    raise SystemExit(main())
