"""A process that does one thing after another, and is replaced when it dies of one or hangs."""

import contextlib
import json
import queue
import signal
import subprocess
import threading
from collections.abc import Sequence
from typing import IO, Any

_READY_S = 90.0  # to import torch and Triton from a disk that has not been read yet


class OneByOne:
    """Sends numbers to a process, a line each, and reads a line of JSON for each; see parity_worker.py.

    limit_s: for one of them.
    """

    def __init__(self, command: Sequence[str], limit_s: float) -> None:
        self._command, self._limit_s = list(command), limit_s
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def run(self, number: int) -> dict[str, Any]:
        """The answer, or one in its form that says how the process ended instead; the next gets a new one.

        RuntimeError if no process can be started.
        """
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(f"{number}\n")
            process.stdin.flush()
            answer = self._hear(self._limit_s)
        except BrokenPipeError:
            answer = None
        if answer is None:
            return self._lost(f"no answer in {self._limit_s:.0f} s, or none any more")
        if not answer["alive"]:
            self.close()
            answer["error"] = f"{answer['error']} (the next cases run in a new process)"
        return answer

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            _end(self._process)
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        assert process.stdout is not None

        def read(output: IO[str]) -> None:
            with output:
                for line in output:
                    lines.put(line)
            lines.put(None)

        threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
        self._process, self._lines = process, lines
        if self._hear(_READY_S) is None:
            self._process = None
            raise RuntimeError(f"the process that runs them does not start: it {_end(process)}")
        return process

    def _hear(self, limit_s: float) -> dict[str, Any] | None:
        """The next line; None after so many seconds, or when the process has ended."""
        try:
            line = self._lines.get(timeout=limit_s)
        except queue.Empty:
            return None
        if line is None:
            return None
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _lost(self, why: str) -> dict[str, Any]:
        assert self._process is not None
        error = f"the process that ran it {_end(self._process)} ({why})"
        self._process = None
        return {"error": error, "seconds": self._limit_s, "alive": False}


def _end(process: subprocess.Popen[str]) -> str:
    """How it has ended; it is ended if it has not."""
    try:
        status = process.wait(1.0)
        how = f"ended with status {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}"
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        how = "hung and was ended"
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    return how
