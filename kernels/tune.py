"""The search behind `halimede tune`: of all configs of a space the fastest, if it is right.

Configs that the launcher refuses, that do not compile, spill, need too much shared memory or give the code of
another one are left out unmeasured. Each other one is timed once; the best few are then timed again, in turns
with the launcher's own choice, and one of them is taken if its median is better by more than the noise.
"""

import contextlib
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field

import torch

from halimede.errors import KernelError
from halimede.kernels.spec import Case, KernelSpec
from halimede.kernels.specialise import Specialisation
from halimede.kernels.store import KernelEntry
from halimede.kernels.target import Target
from halimede.kernels.tune_bench import Bench
from halimede.kernels.tune_journal import Journal, measurement_id
from halimede.kernels.tune_space import Candidate, Tunable, config_id, plan
from halimede.kernels.tuning import KernelConfig

NOISE = 0.02
"""A config must be faster than the launcher's own choice by more than this part of its time."""

_FINALISTS = 3
_ROUNDS = 5

Built = Mapping[str, KernelEntry | str]
"""By a specialisation's key: its manifest, or why it could not be built."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What the search works with.

    build: builds all of the specialisations. open_bench: for a spec, a case and the launcher's own config.
    device: its name; measurements of another one count for nothing. on_measured: is told of each config.
    """

    build: Callable[[Sequence[Specialisation]], Built]
    open_bench: Callable[[KernelSpec, Case, KernelConfig], AbstractContextManager[Bench]]
    journal: Journal
    device: str
    clock: Callable[[], float] = time.monotonic
    on_measured: Callable[[Tunable, KernelConfig], None] = lambda tunable, config: None


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one case, with the launcher's own choice and with the config that was chosen."""

    case: str
    own: float
    chosen: float


@dataclass(frozen=True, slots=True)
class Tuned:
    """What came out for a tunable.

    chosen: the launcher's own config unless is_better. timings: of every case. measured: configs. left_out:
    those that were not measured, or not to the end, by reason. is_complete: the budget was enough for all.
    problem: why the launcher's own choice could not be measured, and nothing therefore.
    """

    tunable: Tunable
    chosen: KernelConfig
    is_better: bool = False
    timings: tuple[Timing, ...] = ()
    measured: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    is_complete: bool = True
    problem: str | None = None


def tune(
    tunables: Sequence[Tunable], target: Target, tools: Tools, *, budget: float = math.inf
) -> Iterator[Tuned]:
    """Search each of the tunables; gives each as it is done.

    budget: seconds for measuring, which begin when all is built; each tunable may use its share of what is
    left. KernelError if the GPU itself fails; run again, it goes on behind the config that did it.
    """
    plans = [_planned(tunable, target) for tunable in tunables]
    wanted = {
        one.key: one
        for candidates, _ in plans
        for candidate in candidates
        for one in candidate.specialisations
    }
    built = tools.build(list(wanted.values()))
    end = tools.clock() + budget
    for index, (tunable, (candidates, left_out)) in enumerate(zip(tunables, plans, strict=True)):
        now = tools.clock()
        deadline = now + max(0.0, end - now) / (len(tunables) - index)
        usable = _usable(candidates, built, target, left_out)
        if isinstance(usable, str):
            yield Tuned(tunable, tunable.own, left_out=left_out, problem=usable)
            continue
        with _Search(tunable, tools) as search:
            yield search.run(usable, deadline, left_out)


def _planned(tunable: Tunable, target: Target) -> tuple[list[Candidate], Counter[str]]:
    """The configs that its launcher takes, its own first, and the count of the others."""
    candidates, left_out = [plan(tunable, tunable.own, target)], Counter[str]()
    for config in tunable.configs[1:]:
        try:
            candidates.append(plan(tunable, config, target))
        except KernelError:
            left_out["refused by the launcher"] += 1
    return candidates, left_out


def _usable(
    candidates: Sequence[Candidate], built: Built, target: Target, left_out: Counter[str]
) -> list[Candidate] | str:
    """Those worth a measurement; the first, which is the launcher's own, in any case, or why it cannot be."""
    usable: list[Candidate] = []
    codes: set[tuple[object, ...]] = set()
    for candidate in candidates:
        found = {one.key: built.get(one.key, "it was not built") for one in candidate.specialisations}
        error = next((entry for entry in found.values() if isinstance(entry, str)), None)
        if error is not None and not usable:
            return error
        entries = {key: entry for key, entry in found.items() if not isinstance(entry, str)}
        code = tuple((entries[one.key].sha256, grid) for one, grid in candidate.launches) if not error else ()
        if error is not None:
            left_out["cannot be compiled"] += 1
        elif usable and any(entry.spills for entry in entries.values()):
            left_out["registers spill"] += 1
        elif usable and any(entry.shared_memory > target.shared_memory for entry in entries.values()):
            left_out["too much shared memory"] += 1
        elif code in codes:
            left_out["the code of another one"] += 1
        else:
            codes.add(code)
            usable.append(candidate)
    return usable


class _Search(contextlib.AbstractContextManager["_Search"]):
    """Of one tunable. Benches are made when they are first needed: with a journal perhaps none is."""

    def __init__(self, tunable: Tunable, tools: Tools) -> None:
        self._tunable, self._tools = tunable, tools
        self._benches: dict[str, Bench] = {}
        self._stack = ExitStack()

    def __exit__(self, *error: object) -> None:
        self._benches.clear()
        self._stack.close()

    def run(self, candidates: Sequence[Candidate], deadline: float, left_out: Counter[str]) -> Tuned:
        """candidates: the launcher's own choice first, which is measured whatever the deadline."""
        own, *others = candidates
        base = self._screened(own)
        if isinstance(base, str):
            return Tuned(self._tunable, own.config, left_out=left_out, problem=base)
        scores: list[tuple[float, int]] = []
        measured = 1
        for index, candidate in enumerate(others):
            if self._tools.clock() >= deadline:
                break
            found = self._screened(candidate)
            measured += 1
            if isinstance(found, str):
                left_out["a wrong result, or none"] += 1
            else:
                scores.append((_score(found, base), index))
        faster = [others[index] for score, index in sorted(scores) if score < 0][:_FINALISTS]
        return self._decide(own, base, faster, measured, left_out, is_complete=measured == len(candidates))

    def _decide(
        self,
        own: Candidate,
        base: Mapping[str, float],
        faster: Sequence[Candidate],
        measured: int,
        left_out: Counter[str],
        *,
        is_complete: bool,
    ) -> Tuned:
        medians = self._in_turns([own, *faster]) if faster else [base]
        base = medians[0] or base
        scored = [(_score(found, base), index) for index, found in enumerate(medians) if found and index]
        score, index = min(scored, default=(0.0, 0))
        is_better = score < math.log1p(-NOISE)
        chosen = (medians[index] if is_better else base) or base
        return Tuned(
            self._tunable,
            faster[index - 1].config if is_better else own.config,
            is_better,
            tuple(Timing(case.name, base[case.name], chosen[case.name]) for case in self._tunable.cases),
            measured,
            left_out,
            is_complete,
        )

    def _in_turns(self, candidates: Sequence[Candidate]) -> list[dict[str, float] | None]:
        """Median seconds of every case; None for one that failed now."""
        times: list[dict[str, list[float]] | None] = [
            {case.name: [] for case in self._tunable.cases} for _ in candidates
        ]
        for _ in range(_ROUNDS):
            for index, candidate in enumerate(candidates):
                for case in self._tunable.cases:
                    found = self._measure(case, candidate)
                    so_far = times[index]
                    if isinstance(found, str):
                        times[index] = None
                    elif so_far is not None:
                        so_far[case.name].append(found)
        return [
            None if found is None else {name: statistics.median(t) for name, t in found.items()}
            for found in times
        ]

    def _screened(self, candidate: Candidate) -> dict[str, float] | str:
        """Seconds of every case, measured or of the journal; or why there are none."""
        found: dict[str, float] = {}
        journal = self._tools.journal
        for case in self._tunable.cases:
            name = f"{self._tunable.spec.name}: {case.name}"
            key = measurement_id(self._tools.device, name, candidate)
            known = journal.get(key)
            if known is None:
                about = f"{name}, {config_id(candidate.config)}"
                try:
                    known = self._measure(case, candidate)
                except KernelError as error:
                    journal.put(key, str(error), about)
                    raise
                journal.put(key, known, about)
            if isinstance(known, str):
                return known
            found[case.name] = known
        self._tools.on_measured(self._tunable, candidate.config)
        return found

    def _measure(self, case: Case, candidate: Candidate) -> float | str:
        spec = self._tunable.spec
        try:
            bench = self._benches.get(case.name)
            if bench is None:
                opened = self._tools.open_bench(spec, case, self._tunable.own)
                bench = self._benches[case.name] = self._stack.enter_context(opened)
            return bench.seconds(candidate.config)
        except (KernelError, torch.OutOfMemoryError) as error:
            return str(error)
        except RuntimeError as error:  # after an invalid access a process can use the GPU no more
            raise KernelError(
                f"the GPU failed while {spec.name} ({case.name}) ran with {config_id(candidate.config)}: "
                f"{error}; run the same command again: it goes on without this config"
            ) from error


def _score(found: Mapping[str, float], base: Mapping[str, float]) -> float:
    """The mean over the cases of the logarithm of the time as a part of `base`'s."""
    return statistics.fmean(math.log(found[name] / base[name]) for name in base)
