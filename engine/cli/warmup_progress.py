"""The progress of `halimede warmup` on a terminal."""

import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halimede.engine.warmup.pool import Outcome
    from halimede.kernels.specialise import Specialisation

# The time that is left is ours: tqdm takes all kernels to be alike.
_BAR = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}"


class Progress:
    """A bar with the time that has gone and that is left; where there is no terminal, one line at the start.

    jobs: processes that compile. missing: kernels that are not built, or failed; None: not known yet.
    """

    def __init__(self, jobs: int) -> None:
        self.missing: int | None = None
        self._jobs = jobs
        self._bar: Any = None
        self._cost_left = self._cost_done = self._seconds = 0.0
        self._ended = threading.Event()
        # A large kernel takes many seconds; a clock that stands still looks like a program that does.
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def start(self, missing: "Sequence[Specialisation]") -> None:
        """These are going to be built."""
        self.missing = len(missing)
        if not missing:
            return
        from tqdm import tqdm

        from halimede.engine.warmup.pool import cost

        self._cost_left = sum(map(cost, missing))
        if not sys.stderr.isatty():
            print(f"compiling {len(missing)} kernels", file=sys.stderr, flush=True)
            return
        self._bar = tqdm(
            total=len(missing), desc="Compiling kernels", dynamic_ncols=True, bar_format=_BAR, mininterval=0
        )
        self._clock.start()

    def advance(self, outcome: "Outcome") -> None:
        """One has been built, or has failed."""
        from halimede.engine.warmup.pool import cost

        done = cost(outcome.specialisation)
        self._cost_left -= done
        if outcome.error is None:
            assert self.missing is not None
            self.missing -= 1
            self._cost_done += done
            self._seconds += outcome.seconds
        if self._bar is not None:
            self._bar.set_postfix_str(self._left(), refresh=False)
            self._bar.update(1)

    def close(self) -> None:
        """Leave the bar as it is, and its line."""
        if self._bar is not None and not self._ended.is_set():
            self._ended.set()
            self._clock.join()
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _left(self) -> str:
        """Until all are built, if the rest takes as long for its cost as what is done took."""
        if not self._cost_done or self._cost_left <= 0:
            return ""
        seconds = round(self._seconds / self._cost_done * self._cost_left / self._jobs) + 1
        return f"about {seconds // 60:02}:{seconds % 60:02} left"

    def _tick(self) -> None:
        while not self._ended.wait(1.0):
            self._bar.refresh()
