"""A device that gets round to its work whenever it likes."""

import random
from collections import deque
from collections.abc import Callable
from typing import Any

from halimede.engine.runner.step_queue import T, Work


class DelayedQueue:
    """Work is done in order, some time between its being handed over and its result being waited for."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._waiting: deque[tuple[Work[Any], list[Any]]] = deque()
        self.longest = 0

    def submit(self, work: Work[T]) -> Callable[[], T]:
        done: list[Any] = []
        self._waiting.append((work, done))
        self.longest = max(self.longest, len(self._waiting))
        self._run(self._random.randint(0, len(self._waiting)))

        def wait() -> T:
            while not done:
                self._run(1)
            copies = [tensor.clone() for tensor in done[0].tensors]
            result: T = done[0].read(copies)
            return result

        return wait

    def drain(self) -> None:
        self._run(len(self._waiting))

    def _run(self, count: int) -> None:
        for _ in range(count):
            work, done = self._waiting.popleft()
            done.append(work())
