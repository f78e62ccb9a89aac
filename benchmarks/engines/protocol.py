"""The worker's side of the protocol: one engine in a process of its own, one JSON object a line.

Standard library only, and Python 3.10: it runs in the environments of other engines. Requests on standard
input:

    {"do": "load", "options": {...}}                  import the engine's packages, load the model
    {"do": "generate", "prompts": [[ids], ...], "max_tokens": n, "want_ids": false}
    {"do": "memory"}                                  peak resident memory, children included
    {"do": "stop"}

Answers, on what standard output was at the start, are {...} or {"error": traceback}.
"""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # prctl(2)


class Engine(ABC):
    """What an engine must be able to do. Greedy, and the end-of-sequence token stops nothing."""

    @abstractmethod
    def import_packages(self) -> None:
        """Import what load() needs, so that it can be timed apart."""

    @abstractmethod
    def load(self, options: dict[str, Any]) -> dict[str, Any]:
        """Load the model; returns facts for the report: "versions", "settings", perhaps "kv_cache_mib"."""

    @abstractmethod
    def generate(self, prompts: list[list[int]], max_tokens: int, want_ids: bool) -> list[list[int]] | None:
        """max_tokens new tokens for each prompt, all prompts given at once; None if want_ids is false.

        Raises RuntimeError when a prompt got another number of tokens.
        """


def check_counts(counts: list[int], max_tokens: int) -> None:
    """Raise RuntimeError unless every prompt got max_tokens new tokens."""
    if any(count != max_tokens for count in counts):
        raise RuntimeError(f"{max_tokens} new tokens were asked for each prompt, but there are {counts}")


def serve(make: Callable[[], Engine]) -> None:
    """Answer requests until "stop" or the end of standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    if sys.platform == "linux":  # the parent may have stopped this process, which then would stay for ever
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    engine = make()
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "stop":
            break
        try:
            answer = _answer(engine, request)
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    if request["do"] == "load":
        engine.import_packages()
        imported = time.perf_counter()
        facts = engine.load(request["options"])
        return {**facts, "import_s": imported - start, "model_s": time.perf_counter() - imported}
    if request["do"] == "generate":
        ids = engine.generate(request["prompts"], request["max_tokens"], request["want_ids"])
        return {"seconds": time.perf_counter() - start, "token_ids": ids}
    if request["do"] == "memory":
        return {"peak_mib": sum(_peak_mib(pid) for pid in [os.getpid(), *_descendants(os.getpid())])}
    raise ValueError(f"unknown request {request['do']!r}")


def _peak_mib(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended, or there is no /proc
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)


def _descendants(pid: int) -> list[int]:
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found += [child, *_descendants(child)]
    return found
