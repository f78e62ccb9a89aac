"""How far a batch is: a bar on a terminal, a line every ten seconds anywhere else. Both on standard error."""

import sys
import time
from types import TracebackType
from typing import Protocol, Self, TextIO

_SECONDS_BETWEEN_LINES = 10.0


class _Display(Protocol):
    """Shows the state now and then."""

    def update(self, state: "BatchProgress") -> None:
        """After each finished line."""
        ...

    def close(self, state: "BatchProgress") -> None:
        """At the end."""
        ...


class BatchProgress:
    """Counts finished lines and tokens, and shows them unless `show` is False.

    num_done, num_failed: at first what earlier runs have left, which does not count for the speed.
    """

    def __init__(self, num_lines: int, num_done: int, num_failed: int, *, show: bool = True) -> None:
        self.num_lines, self.num_done, self.num_failed = num_lines, num_done, num_failed
        self.prompt_tokens = self.output_tokens = 0
        self._num_before, self._started = num_done, time.monotonic()
        self._display: _Display | None = None
        if show:
            self._display = _Bar(self) if sys.stderr.isatty() else _Lines(sys.stderr, self._started)

    def add(self, *, failed: bool, prompt_tokens: int, output_tokens: int) -> None:
        """Count one finished line."""
        self.num_done += 1
        self.num_failed += failed
        self.prompt_tokens += prompt_tokens
        self.output_tokens += output_tokens
        if self._display is not None:
            self._display.update(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None:
            self._display.close(self)

    @property
    def seconds(self) -> float:
        """Since the start of this run."""
        return time.monotonic() - self._started

    @property
    def seconds_left(self) -> float | None:
        """If the rest goes as fast as this run has gone so far; None while nothing is known."""
        done = self.num_done - self._num_before
        return self.seconds / done * (self.num_lines - self.num_done) if done else None

    @property
    def counts(self) -> str:
        """Failures and speed, for people. The speed counts the tokens of finished lines."""
        if not self.output_tokens:
            return f"{self.num_failed} failed"
        return f"{self.num_failed} failed, {self.output_tokens / max(self.seconds, 1e-9):.1f} tok/s"


class _Lines:
    def __init__(self, file: TextIO, started: float) -> None:
        self._file, self._last = file, started

    def update(self, state: BatchProgress) -> None:
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            self._print(state)

    def close(self, state: BatchProgress) -> None:
        self._print(state)

    def _print(self, state: BatchProgress) -> None:
        left = state.seconds_left
        share = f"{100 * state.num_done / max(state.num_lines, 1):.1f} %"
        remaining = f", {_clock(left)} left" if left is not None else ""
        print(
            f"{state.num_done}/{state.num_lines} lines ({share}), {state.counts}, "
            f"{_clock(state.seconds)} gone{remaining}",
            file=self._file,
            flush=True,
        )


class _Bar:
    def __init__(self, state: BatchProgress) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.percentage:.1f} %"),
            TextColumn("{task.fields[counts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(stderr=True),
            refresh_per_second=2,
        )
        self._task = self._progress.add_task(
            "batch", total=state.num_lines, completed=state.num_done, counts=state.counts
        )
        self._progress.start()

    def update(self, state: BatchProgress) -> None:
        self._progress.update(self._task, completed=state.num_done, counts=state.counts)

    def close(self, state: BatchProgress) -> None:
        self._progress.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
