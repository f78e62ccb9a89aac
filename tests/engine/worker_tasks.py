"""What the processes of test_workers.py do; imports no torch, so they start at once.

python worker_tasks.py FOLDER    two processes that write their numbers into FOLDER and then work for ever
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from halimede.engine.warmup.workers import Workers


def double(task: int) -> tuple[int, int]:
    return 2 * task, os.getpid()


def run(task: str) -> str:
    """ "kill 9", "exit 3", "raise it", "say it" (and return it)."""
    what, _, rest = task.partition(" ")
    print(f"about to {what}", file=sys.stderr, flush=True)
    if what == "kill":
        os.kill(os.getpid(), int(rest))
    if what == "exit":
        os._exit(int(rest))
    if what == "raise":
        raise ValueError(rest)
    return rest


def die_unless_there(task: str) -> str:
    """Dies if the file is not there yet."""
    if not Path(task).exists():
        Path(task).touch()
        os._exit(1)
    return tempfile.gettempdir()


def sleep(folder: str) -> None:
    (Path(folder) / str(os.getpid())).write_text(tempfile.gettempdir())
    time.sleep(600)


class Unloadable:
    """Cannot be sent."""

    def __reduce__(self) -> tuple[Callable[[int], None], tuple[int]]:
        return os._exit, (7,)


def main(folder: str) -> None:
    with Workers(sleep) as workers:
        list(workers.run([folder, folder], jobs=2))


if __name__ == "__main__":
    main(sys.argv[1])
