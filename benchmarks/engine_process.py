"""The benchmark's side of the protocol: starts an engine in a process of its own and talks to it.

A worker that is not being measured is stopped with SIGSTOP, with its children: whatever its threads do when
they wait, they do it without taking time from the engine that is.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ENGINES = Path(__file__).parent / "engines"


class EngineError(Exception):
    """A worker failed; the message holds its traceback and the end of what it logged."""


@dataclass(frozen=True)
class EngineSpec:
    """One row of a table. options go to the worker's load(); env is added to the environment.

    slow_start: loading takes minutes, so it is measured once only.
    """

    name: str
    script: str
    options: Mapping[str, Any]
    python: Path = Path(sys.executable)
    env: Mapping[str, str] = field(default_factory=dict)
    slow_start: bool = False


class EngineProcess:
    """A running worker. `load_s` is from the start of the process to the engine being ready."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
        start = time.perf_counter()
        self._process = subprocess.Popen(
            [str(spec.python), str(ENGINES / spec.script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **spec.env},
            text=True,
            start_new_session=True,  # a group of its own, to be stopped as a whole
        )
        try:
            self.facts = self._ask("load", options=dict(spec.options))
        except BaseException:
            self.close()
            raise
        self.load_s = time.perf_counter() - start
        self._signal(signal.SIGSTOP)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let the worker run; outside of this it stands still."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            if self._process.poll() is None:
                self._signal(signal.SIGSTOP)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, *, want_ids: bool = False
    ) -> tuple[float, list[list[int]] | None]:
        """Seconds that it took, and the new tokens if wanted. Only inside awake()."""
        answer = self._ask("generate", prompts=prompts, max_tokens=max_tokens, want_ids=want_ids)
        return answer["seconds"], answer["token_ids"]

    def peak_mib(self) -> float:
        """The most memory that the worker and its children have had resident. Only inside awake()."""
        return float(self._ask("memory")["peak_mib"])

    def close(self) -> None:
        """End the worker and all its children."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": "stop"}) + "\n")
            self._process.stdin.close()
        except OSError:
            pass  # it is gone already
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=20)
        self._signal(signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()

    def _ask(self, what: str, **details: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **details}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise EngineError(
                f"{self.spec.name}: the worker ended with status {self._process.wait()}\n{self._tail()}"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.spec.name}: {what} failed\n{answer['error']}\n{self._tail()}")
        return answer

    def _tail(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-4000:]

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
