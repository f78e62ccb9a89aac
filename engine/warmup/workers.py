"""Processes that each do one task at a time: one that dies costs nobody else his work, and its task is known.

Not concurrent.futures: there a process that dies breaks the whole pool, and when the parent is killed the
others wait for ever.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, TypeVar

from halimede.errors import KernelError

_Task = TypeVar("_Task")
_Answer = TypeVar("_Answer")

# Not forked: torch and Triton have threads.
_CONTEXT = multiprocessing.get_context("spawn")
# Ctrl-C, the end of a terminal, `timeout`.
_FOR_THE_PARENT = frozenset({signal.SIGINT, signal.SIGHUP, signal.SIGTERM})
_STDERR = "stderr"
_TAIL = 2048  # bytes of a process's standard error that are looked at


@dataclass(frozen=True, slots=True)
class Death:
    """The process ended instead of answering. reason: how, and the last thing that it said."""

    reason: str


@dataclass(slots=True)
class _Worker(Generic[_Task]):
    """folder: of its own, for temporary files. is_ready: it has imported what it needs."""

    process: BaseProcess
    connection: Connection
    folder: Path
    is_ready: bool = False
    task: _Task | None = None


class Workers(Generic[_Task, _Answer]):
    """do: what they do with a task; it is sent to them, so a function of a module or a partial of one.

    Within `with`; at its end they are stopped at once, whatever they do. Their temporary files go with them,
    also when they are killed.
    """

    def __init__(self, do: Callable[[_Task], _Answer]) -> None:
        self._do = do
        self._workers: list[_Worker[_Task]] = []

    def __enter__(self) -> "Workers[_Task, _Answer]":
        self._folder = Path(tempfile.mkdtemp(prefix="halimede-warmup-"))
        return self

    def __exit__(self, *error: object) -> None:
        self._keep(0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, tasks: Sequence[_Task], jobs: int) -> Iterator[tuple[_Task, _Answer | Death]]:
        """Each task with its answer, as they come, from at most `jobs` processes.

        KernelError if no process can be started.
        """
        self._keep(jobs)
        waiting = deque(tasks)
        while busy := sum(worker.task is not None for worker in self._workers) + len(waiting):
            while len(self._workers) < min(jobs, busy):
                self._start()
            for worker in self._workers:
                if waiting and worker.is_ready and worker.task is None:
                    worker.task = waiting.popleft()
                    with contextlib.suppress(ConnectionError):  # it has died: the next turn sees that
                        worker.connection.send(worker.task)
            spoke = wait([worker.connection for worker in self._workers])
            for worker in [worker for worker in self._workers if worker.connection in spoke]:
                task, answer = self._hear(worker)
                if task is not None:
                    yield task, answer
                elif isinstance(answer, Death):
                    jobs = len(self._workers)  # as many as can be started
                    if not jobs:
                        raise KernelError(
                            f"a process that compiles kernels cannot be started: {answer.reason}"
                        )

    def _hear(self, worker: _Worker[_Task]) -> tuple[_Task | None, Any]:
        """The task that it did, if any, and what it answers."""
        task, worker.task = worker.task, None
        try:
            answer = worker.connection.recv()
        except (EOFError, ConnectionError):
            self._workers.remove(worker)
            return task, Death(_reason(worker))
        worker.is_ready = True
        return task, answer

    def _start(self) -> None:
        ours, theirs = _CONTEXT.Pipe()
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        process = _CONTEXT.Process(target=_work, args=(self._do, theirs, folder), daemon=True)
        # What reaches a whole group is for the parent, with which the others end. The tracker is started
        # first, because starting it would let Ctrl-C through again.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_PARENT)
        try:
            process.start()
            self._workers.append(_Worker(process, ours, folder))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def _keep(self, number: int) -> None:
        """End the others."""
        ended, self._workers = self._workers[number:], self._workers[:number]
        for worker in ended:
            worker.process.kill()
        for worker in ended:
            worker.process.join()
            worker.connection.close()


def _reason(worker: _Worker[Any]) -> str:
    """Why it has died, for people."""
    worker.process.join()
    worker.connection.close()
    code = worker.process.exitcode or 0
    reason = f"ended with status {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        reason += " (the system does that where memory runs out; --jobs 1 needs the least)"
    try:
        text = (worker.folder / _STDERR).read_bytes()[-_TAIL:].decode(errors="replace")
    except OSError:
        text = ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{reason}: {lines[-1]}" if lines else reason


def _work(do: Callable[[Any], Any], connection: Connection, folder: Path) -> None:
    """What the process does."""
    threading.Thread(target=_end_with_parent, args=(folder.parent,), daemon=True).start()
    # What the compilers leave when they are stopped is removed with the folder; what they print says why
    # they failed, and does not belong into the progress bar.
    tempfile.tempdir = str(folder)
    os.dup2(os.open(folder / _STDERR, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    connection.send(None)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            task = connection.recv()
            os.ftruncate(2, 0)
            connection.send(do(task))


def _end_with_parent(folder: Path) -> None:
    """A parent that was killed cannot end its processes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
