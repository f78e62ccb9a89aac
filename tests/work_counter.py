"""Counts Python's work in place of timing it: that is the same at every run, on every machine."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


class Counter:
    """Lines of Python run, and functions called, built-in ones included."""

    def __init__(self) -> None:
        self.lines = self.calls = 0

    def measure(self, function: Callable[[], Any]) -> None:
        sys.setprofile(self._on_call)
        sys.settrace(self._on_line)
        try:
            function()
        finally:
            sys.settrace(None)
            sys.setprofile(None)

    def _on_call(self, frame: FrameType, event: str, arg: object) -> None:
        self.calls += event in ("call", "c_call")

    def _on_line(self, frame: FrameType, event: str, arg: object) -> Any:
        self.lines += event == "line"
        return self._on_line
