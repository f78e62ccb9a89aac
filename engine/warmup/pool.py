"""Builds kernels in several processes and puts them into the kernel cache.

Each kernel is in the cache, whole, as soon as it is built: a run that is stopped, even killed, loses only
what was being built, and the next one goes on from there.
"""

import concurrent.futures
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halimede.engine.runner.memory import available_memory
from halimede.errors import CorruptKernelError, KernelCacheError, KernelError
from halimede.kernels.build import build
from halimede.kernels.specialise import TRITON_VERSION, Specialisation, find_kernel
from halimede.kernels.store import KernelStore
from halimede.kernels.target import find_target

_BYTES_PER_JOB = 1 << 30  # of a process: torch, Triton and LLVM with a large kernel


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
    """Of one kernel: bytes of its binary, and what was wrong if it could not be built."""

    specialisation: Specialisation
    size: int = 0
    error: str | None = None


@dataclass(slots=True)
class Summary:
    """Of a run. bytes: of the binaries, compiled and cached. failed: a description and the error of each."""

    compiled: int = 0
    cached: int = 0
    failed: list[tuple[Specialisation, str]] = field(default_factory=list)
    seconds: float = 0.0
    bytes: int = 0


def default_jobs() -> int:
    """Processes: one for each core that this one may use, and no more than memory allows."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, available_memory() // _BYTES_PER_JOB))


def build_all(
    specialisations: Sequence[Specialisation],
    store: KernelStore,
    *,
    jobs: int,
    on_start: Callable[[int], None] = lambda missing: None,
    on_done: Callable[[Outcome], None] = lambda outcome: None,
) -> Summary:
    """Build those that the cache does not have intact.

    on_start: is told how many those are; on_done: each as it is built or fails. KernelCacheError if the
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
    on_start(len(missing))
    # The longest first: no process should end with one while the others have nothing left to do.
    missing.sort(key=lambda one: "attention" not in one.name)
    for outcome in _run(missing, store, jobs):
        if outcome.error is None:
            summary.compiled += 1
            summary.bytes += outcome.size
        else:
            summary.failed.append((outcome.specialisation, outcome.error))
        on_done(outcome)
    summary.seconds = time.monotonic() - start
    return summary


def _size_if_intact(one: Specialisation, store: KernelStore) -> int | None:
    try:
        found = store.read(TRITON_VERSION, one.target.machine, one.key)
    except CorruptKernelError:
        return None
    return None if found is None else found[0].size


def _run(missing: Sequence[Specialisation], store: KernelStore, jobs: int) -> Iterator[Outcome]:
    """The outcomes, as they come. A process that dies takes the others' work with it: that is done again,
    one kernel to a process, so that the one which cannot be built is known."""
    lost: list[Specialisation] = []
    yield from _run_pool(missing, store, jobs, lost.append)
    for one in lost:
        again: list[Specialisation] = []
        yield from _run_pool([one], store, 1, again.append)
        if again:
            yield Outcome(one, error="the compiler ended the process: out of memory, or a crash of LLVM")


def _run_pool(
    wanted: Sequence[Specialisation],
    store: KernelStore,
    jobs: int,
    on_lost: Callable[[Specialisation], None],
) -> Iterator[Outcome]:
    if not wanted:
        return
    # Not forked: torch and Triton have threads.
    pool = concurrent.futures.ProcessPoolExecutor(
        min(jobs, len(wanted)), multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        futures = {pool.submit(_build_one, Task.of(one), store.folder): one for one in wanted}
        for future in concurrent.futures.as_completed(futures):
            try:
                size, error = future.result()
            except BrokenProcessPool:
                on_lost(futures[future])
            else:
                yield Outcome(futures[future], size, error)
    finally:
        _stop(pool)


def _stop(pool: concurrent.futures.ProcessPoolExecutor) -> None:
    """At once: after an interruption nobody waits for what is being compiled."""
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()


def _start_worker() -> None:
    # Ctrl-C reaches the whole group; the parent ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _build_one(task: Task, folder: Path) -> tuple[int, str | None]:
    """Bytes of the binary, or 0 and the error."""
    try:
        entry, binary = build(task.specialisation())
    except KernelError as error:
        return 0, str(error)
    try:
        KernelStore(folder).write(entry, binary)
    except OSError as error:
        raise KernelCacheError(
            f"the kernel cache {folder} cannot be written ({error}); free space or choose another folder "
            "with -o, and run again: what was built so far is kept"
        ) from error
    return entry.size, None


def unique(specialisations: Iterable[Specialisation]) -> list[Specialisation]:
    """Each key once, in order."""
    return list({one.key: one for one in specialisations}.values())
