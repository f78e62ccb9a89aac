"""The processes of warm-up: who dies, who is stopped, and what is left of them."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import worker_tasks

from halimede.engine.warmup.workers import Death, Workers
from halimede.errors import KernelError


def run(do: Any, tasks: list[Any], jobs: int) -> dict[Any, Any]:
    with Workers(do) as workers:
        answers = list(workers.run(tasks, jobs))
    assert len(answers) == len(tasks)
    return dict(answers)


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_each_task_is_done_once() -> None:
    answers = run(worker_tasks.double, list(range(50)), jobs=2)
    assert {task: answer[0] for task, answer in answers.items()} == {n: 2 * n for n in range(50)}
    pids = {answer[1] for answer in answers.values()}
    assert len(pids) <= 2
    assert os.getpid() not in pids
    assert run(worker_tasks.double, [], jobs=2) == {}


def test_a_death_costs_one_task_and_says_why() -> None:
    tasks = ["say a", "kill 9", "say b", "exit 3", "raise it is full", "say c", "kill 11", "say d"]
    answers = run(worker_tasks.run, tasks, jobs=2)
    assert {task: answers[task] for task in tasks if task.startswith("say")} == {
        "say a": "a",
        "say b": "b",
        "say c": "c",
        "say d": "d",
    }
    reasons = {task: answer.reason for task, answer in answers.items() if isinstance(answer, Death)}
    assert reasons["kill 9"].startswith("was ended by SIGKILL (the system does that where memory runs out")
    assert reasons["kill 9"].endswith(": about to kill")
    assert reasons["kill 11"] == "was ended by SIGSEGV: about to kill"
    assert reasons["exit 3"] == "ended with status 3: about to exit"
    assert reasons["raise it is full"] == "ended with status 1: ValueError: it is full"


def test_the_same_processes_take_more_tasks(tmp_path: Path) -> None:
    tasks = [str(tmp_path / "a"), str(tmp_path / "b")]
    with Workers(worker_tasks.die_unless_there) as workers:
        assert all(isinstance(answer, Death) for _, answer in workers.run(tasks, 2))
        folders = [answer for _, answer in workers.run(tasks, 1)]
        assert len(set(folders)) == 1
        assert os.path.isdir(folders[0])
    assert not os.path.exists(os.path.dirname(folders[0]))


def test_what_they_do_is_stopped_at_once(tmp_path: Path) -> None:
    def press_ctrl_c() -> None:
        wait_until(lambda: any(tmp_path.iterdir()))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press_ctrl_c)
    thread.start()
    with pytest.raises(KeyboardInterrupt), Workers(worker_tasks.sleep) as workers:
        next(workers.run([str(tmp_path)] * 2, 2))
    thread.join()
    processes = [int(path.name) for path in tmp_path.iterdir()]
    assert processes
    assert not any(map(is_alive, processes))


@pytest.mark.parametrize(
    ("number", "whole_group"),
    [
        (signal.SIGKILL, False),
        (signal.SIGINT, True),
        (signal.SIGHUP, True),
        (signal.SIGTERM, False),
    ],
)
def test_they_end_with_their_parent(number: signal.Signals, whole_group: bool, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    parent = subprocess.Popen(
        [sys.executable, worker_tasks.__file__, str(there)],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: len(list(there.iterdir())) == 2)
    if whole_group:
        os.killpg(parent.pid, number)
    else:
        os.kill(parent.pid, number)
    said = parent.communicate(timeout=20)[1]
    wait_until(lambda: not any(is_alive(int(path.name)) for path in there.iterdir()))
    wait_until(lambda: list(tmp_path.iterdir()) == [there])
    assert said.count("Traceback") == (number == signal.SIGINT)


def test_a_process_that_cannot_be_started_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(KernelError, match="cannot be started: ended with status 7"),
        Workers(partial(worker_tasks.double, worker_tasks.Unloadable())) as workers,  # type: ignore[arg-type]
    ):
        list(workers.run([1, 2, 3], 2))
