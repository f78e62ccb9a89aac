"""Keeps Ctrl-C out of the places where it would leave half-changed state behind.

Between the start and the end of a step the scheduler, the prefix cache and the texts agree only at certain
points. Inside `defer_interrupts` a Ctrl-C is noted and raised at the end; `allow_interrupts` opens a window
in it, around the long part that can be stopped: running the model.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_Handler = Callable[[int, FrameType | None], Any]


class _Deferred:
    """A handler of SIGINT that notes the signal for the one that it stands in for; open, it passes it on."""

    def __init__(self, original: _Handler) -> None:
        self.original = original
        self.open = False  # cheaper, twice a step, than to put the original back for a while
        self._frame: FrameType | None = None
        self._pending = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self._pending, self._frame = True, frame
        if self.open:
            self.deliver()

    def deliver(self) -> None:
        """Raise, or whatever the original handler does, if a signal has come."""
        if self._pending:
            self._pending = False
            self.original(signal.SIGINT, self._frame)


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt at the end of the block and not inside it. May be nested.

    Only the main thread receives signals, and only where Python handles them is there anything to defer.
    """
    original = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    is_deferred = isinstance(original, _Deferred) and not original.open
    if not in_main_thread or not callable(original) or is_deferred:
        yield
        return
    deferred = _Deferred(original)
    signal.signal(signal.SIGINT, deferred)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, original)
        deferred.deliver()


@contextmanager
def allow_interrupts() -> Iterator[None]:
    """Let KeyboardInterrupt through inside a defer_interrupts block."""
    deferred = signal.getsignal(signal.SIGINT)
    if not isinstance(deferred, _Deferred) or deferred.open:
        yield
        return
    try:
        deferred.open = True
        deferred.deliver()
        yield
    finally:
        deferred.open = False
