"""Builds kernels in several processes and puts them into the kernel cache.

Each kernel is in the cache, whole, as soon as it is built: a run that is stopped, even killed, loses only
what was being built, and the next one goes on from there.
"""

import errno
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from halimede.engine.runner.memory import available_memory
from halimede.engine.warmup.workers import Death, Workers
from halimede.errors import CorruptKernelError, KernelCacheError, KernelError
from halimede.kernels.build import build
from halimede.kernels.specialise import TRITON_VERSION, Specialisation, find_kernel
from halimede.kernels.store import KernelStore
from halimede.kernels.target import find_target

_BYTES_PER_JOB = 1 << 30  # of a process: torch, Triton and LLVM with a large kernel
# About how much longer these take than the others; seen on all targets: 1 to 3.5 s against 0.1 to 0.5.
_SLOW = ("_attention_decode_kernel", "_prefill_kernel", "_logprobs_kernel", "_threshold_kernel")
_TIMES_SLOWER = 6.0
# Of the disk and its rights, not of the kernel.
_UNWRITABLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})


@dataclass(frozen=True, slots=True)
class Task:
    """A specialisation as it crosses to another process: see Specialisation."""

    kernel: str
    target: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]

    @classmethod
    def of(cls, one: Specialisation) -> "Task":
        """The task of building it."""
        return cls(one.name, one.target.machine, dict(one.signature), dict(one.constants), dict(one.options))

    def specialisation(self) -> Specialisation:
        """What it was made of."""
        target = find_target(self.target)
        return Specialisation(find_kernel(self.kernel), target, self.signature, self.constants, self.options)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one kernel: bytes of its binary, and what was wrong if it could not be built.

    seconds: that it took a process.
    """

    specialisation: Specialisation
    size: int = 0
    error: str | None = None
    seconds: float = 0.0


@dataclass(slots=True)
class Summary:
    """Of a run. bytes: of the binaries, compiled and cached. failed: the error of each. seconds: of all."""

    compiled: int = 0
    cached: int = 0
    failed: list[tuple[Specialisation, str]] = field(default_factory=list)
    seconds: float = 0.0
    bytes: int = 0


def default_jobs() -> int:
    """Processes: one for each core that this one may use, and no more than memory allows."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, available_memory() // _BYTES_PER_JOB))


def cost(one: Specialisation) -> float:
    """About how long it takes to build, in multiples of what most take."""
    return _TIMES_SLOWER if one.name.partition(":")[2].endswith(_SLOW) else 1.0


def build_all(
    specialisations: Sequence[Specialisation],
    store: KernelStore,
    *,
    jobs: int,
    on_start: Callable[[Sequence[Specialisation]], None] = lambda missing: None,
    on_done: Callable[[Outcome], None] = lambda outcome: None,
) -> Summary:
    """Build those that the cache does not have intact.

    on_start: is told which those are; on_done: each as it is built or fails. KernelCacheError if the
    folder cannot be written; what was built before is kept.
    """
    start, summary = time.monotonic(), Summary()
    missing = []
    for one in specialisations:
        size = _size_if_intact(one, store)
        if size is None:
            missing.append(one)
        else:
            summary.cached += 1
            summary.bytes += size
    if missing and (obstacle := _obstacle(store)):
        raise _stopped(obstacle, summary, len(specialisations))
    on_start(missing)
    # The longest first: no process should end with one while the others have nothing left to do.
    missing.sort(key=cost, reverse=True)
    with closing(_answers(missing, store, jobs)) as answers:
        for one, answer in answers:
            if answer.obstacle is not None:
                raise _stopped(answer.obstacle, summary, len(specialisations))
            outcome = Outcome(one, answer.size, answer.error, answer.seconds)
            if outcome.error is None:
                summary.compiled += 1
                summary.bytes += outcome.size
            else:
                summary.failed.append((one, outcome.error))
            on_done(outcome)
    summary.seconds = time.monotonic() - start
    return summary


def _size_if_intact(one: Specialisation, store: KernelStore) -> int | None:
    try:
        found = store.read(TRITON_VERSION, one.target.machine, one.key)
    except (CorruptKernelError, OSError):  # what cannot be read is written anew, and that tells why
        return None
    return None if found is None else found[0].size


def _obstacle(store: KernelStore) -> str | None:
    """Why nothing can be written there; asked before anything is compiled for nothing."""
    try:
        store.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _unwritable(store.folder, error)
    if not os.access(store.root, os.W_OK | os.X_OK):
        return _unwritable(store.folder, f"no right to write into {store.root}")
    return None


def _unwritable(folder: Path, why: object) -> str:
    return f"the kernel cache {folder} cannot be written ({why}); free space there or choose another with -o"


def _stopped(obstacle: str, summary: Summary, wanted: int) -> KernelCacheError:
    kept = summary.cached + summary.compiled
    return KernelCacheError(f"{obstacle}, and run again: {kept} of {wanted} kernels are there and are kept")


@dataclass(frozen=True, slots=True)
class _Answer:
    """Of a process: an Outcome's fields, or an obstacle that all other kernels would meet, too."""

    size: int = 0
    error: str | None = None
    seconds: float = 0.0
    obstacle: str | None = None


def _answers(
    missing: Sequence[Specialisation], store: KernelStore, jobs: int
) -> Generator[tuple[Specialisation, _Answer], None, None]:
    """As they come. What a process died of is tried again at the end, alone: perhaps memory ran out."""
    wanted = {one.key: one for one in missing}
    again: list[_Keyed] = []
    with Workers(partial(_build_one, store.folder)) as workers:
        for keyed, answer in workers.run([(key, Task.of(one)) for key, one in wanted.items()], jobs):
            if isinstance(answer, Death):
                again.append(keyed)
            else:
                yield wanted[keyed[0]], answer
        for keyed, answer in workers.run(again, 1):
            if isinstance(answer, Death):
                answer = _Answer(error=f"the compiler's process {answer.reason}")
            yield wanted[keyed[0]], answer


_Keyed = tuple[str, Task]


def _build_one(folder: Path, keyed: _Keyed) -> _Answer:
    """Build it into the cache in `folder`; runs in a process of its own."""
    start = time.monotonic()
    try:
        entry, binary = build(keyed[1].specialisation())
    except KernelError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in _UNWRITABLE:
            return _Answer(
                obstacle=f"the compiler's temporary files cannot be written ({cause}); free space there or "
                "set TMPDIR to another folder"
            )
        return _Answer(error=str(error))
    try:
        KernelStore(folder).write(entry, binary)
    except OSError as error:
        return _Answer(obstacle=_unwritable(folder, error))
    return _Answer(entry.size, seconds=time.monotonic() - start)
