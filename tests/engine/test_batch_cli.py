"""`halimede batch` as a user runs it: killed, interrupted, resumed, through pipes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_tiny_checkpoint

from halimede import LLM
from halimede.engine.batch.run import run_batch

COMMAND = "from halimede.engine.cli.main import main; main()"
# Does something right after the third result of this process is in the file.
AFTER_THE_THIRD = """
import os, signal
from halimede.engine.batch.results import ResultsFile
append, count = ResultsFile.append, [0]
def stopped(self, record):
    append(self, record)
    count[0] += 1
    if count[0] == 3:
        {action}
ResultsFile.append = stopped
"""
KILL = 'self._write(b\'{"id": "batch_req_12", "cus\'); os.kill(os.getpid(), signal.SIGKILL)'
CTRL_C = "signal.raise_signal(signal.SIGINT)"
OPTIONS = ("--max-model-len", "64", "--dtype", "float32", "--max-num-seqs", "2")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("m"), "LlamaForCausalLM", tokenizer=True))


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Greedy ones, seeded ones and ones that leave the seed to the engine; all of them valid."""
    path = tmp_path_factory.mktemp("requests") / "in.jsonl"
    with path.open("w") as file:
        for i in range(9):
            body: dict[str, Any] = {"max_tokens": 3 + i % 4, "ignore_eos": True}
            body |= [{"temperature": 0}, {"temperature": 1.5, "seed": i}, {"temperature": 1.5}][i % 3]
            url = "/v1/chat/completions" if i % 2 else "/v1/completions"
            body |= (
                {"messages": [{"role": "user", "content": f"{i}"}]} if i % 2 else {"prompt": f"number {i}"}
            )
            file.write(json.dumps({"custom_id": f"c{i}", "method": "POST", "url": url, "body": body}) + "\n")
    return path


def batch(
    checkpoint: str, input: Any, output: Any, *more: str, before: str = "", stdin: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    arguments = ["batch", "-i", str(input), "-o", str(output), "--model", checkpoint, *OPTIONS, *more]
    return subprocess.run(
        [sys.executable, "-c", before + COMMAND, *arguments],
        capture_output=True,
        input=stdin,
        env={**os.environ, "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"},
        timeout=120,
        check=False,
    )


def choices(output: bytes) -> dict[str, Any]:
    """By custom_id; each is there once, and none has failed."""
    records = [json.loads(line) for line in output.splitlines()]
    assert all(r["error"] is None and r["response"]["status_code"] == 200 for r in records)
    by_id = {r["custom_id"]: r["response"]["body"]["choices"] for r in records}
    assert len(by_id) == len(records)
    return by_id


def test_killed_interrupted_and_resumed_it_gives_what_an_undisturbed_run_gives(
    checkpoint: str, requests: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    killed = batch(checkpoint, requests, output, before=AFTER_THE_THIRD.format(action=KILL))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    written = output.read_bytes()
    assert written.count(b"\n") == 3
    assert not written.endswith(b"\n")

    interrupted = batch(checkpoint, requests, output, before=AFTER_THE_THIRD.format(action=CTRL_C))
    assert interrupted.returncode == 130, interrupted.stderr
    assert b"3 of 9 lines have results already" in interrupted.stderr
    assert b"the same command goes on" in interrupted.stderr
    assert b"Traceback" not in interrupted.stderr
    assert len(choices(output.read_bytes())) == 6

    with LLM(checkpoint, max_model_len=64, dtype="float32") as llm:
        assert run_batch(llm, requests, output, show_progress=False).num_resumed == 6
    found = choices(output.read_bytes())
    assert set(found) == {f"c{i}" for i in range(9)}

    piped = batch(checkpoint, "-", "-", stdin=requests.read_bytes())
    assert piped.returncode == 0, piped.stderr
    assert b"9 lines: 9 succeeded, 0 failed" in piped.stderr
    assert choices(piped.stdout) == found


def test_failed_lines_give_status_3_and_a_finished_batch_needs_no_model(
    checkpoint: str, requests: Path, tmp_path: Path
) -> None:
    input, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    input.write_bytes(requests.read_bytes().splitlines()[0] + b"\nnonsense\n")
    names = ("--served-model-name", "some-name")
    done = batch(checkpoint, input, output, *names)
    assert done.returncode == 3, done.stderr
    assert b"2 lines: 1 succeeded, 1 failed" in done.stderr
    assert done.stdout == b""
    models = [json.loads(line)["response"]["body"].get("model") for line in output.read_text().splitlines()]
    assert sorted(models, key=str) == [None, "some-name"]
    again = batch("./nowhere", input, output)
    assert again.returncode == 3
    assert b"2 of 2 lines have results already" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("-i", "nowhere.jsonl", "-o", "OUT", "-m", "m"), 1, [b"nowhere.jsonl", b"check the path"]),
        (("-i", "IN", "-o", "IN", "-m", "m"), 1, [b"is the input as well"]),
        (("-i", "IN", "-o", "OUT", "-m", "./nowhere"), 1, [b"./nowhere"]),
        (("-i", "IN", "-o", "OUT", "-m", "m", "--block-size", "20"), 1, [b"block_size", b"20"]),
        (("-i", "IN", "-o", "OUT"), 2, [b"--model"]),
    ],
)
def test_errors_are_one_line_and_no_traceback(
    requests: Path, tmp_path: Path, arguments: tuple[str, ...], status: int, words: list[bytes]
) -> None:
    places = {"IN": str(requests), "OUT": str(tmp_path / "out.jsonl")}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "batch", *(places.get(a, a) for a in arguments)],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert b"Traceback" not in done.stderr
    assert done.stdout == b""
