"""The command, run as a user runs it."""

import os
import subprocess
import sys

import pytest
from tiny_models import write_tiny_checkpoint

COMMAND = [sys.executable, "-m", "halimede.engine.cli.main"]


def run(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, input=stdin, env=env, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("m"), "LlamaForCausalLM", tokenizer=True))


def test_help_and_version_need_no_model() -> None:
    assert "generate" in run("--help").stdout
    assert run("--version").stdout.startswith("halimede ")
    text = run("generate", "--help").stdout
    assert all(flag in text for flag in ("--max-model-len", "--block-size", "--raw", "--temperature"))


def test_generate_streams_the_answer_and_reports_speed_beside_it(checkpoint: str) -> None:
    options = ("--max-tokens", "5", "--temperature", "0", "--max-model-len", "64", "--dtype", "float32")
    done = run("generate", checkpoint, "hello", *options)
    assert done.returncode == 0, done.stderr
    assert "prompt tokens" in done.stderr
    assert "prompt tokens" not in done.stdout
    piped = run("generate", checkpoint, "-", *options, stdin="hello")
    assert piped.stdout == done.stdout
    raw = run("generate", checkpoint, "hello", "--raw", *options)
    assert raw.returncode == 0, raw.stderr
    assert raw.stdout != done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("generate", "./nowhere", "hi"), 1, ["error:", "nowhere"]),
        (("generate", "CHECKPOINT", "hi", "--block-size", "20"), 1, ["error:", "block_size", "20"]),
        (("generate", "CHECKPOINT", "hi", "--temperature", "-1"), 1, ["error:", "temperature", "-1"]),
        (("generate", "CHECKPOINT", "", "--raw"), 1, ["error:", "empty"]),
        (("generate", "CHECKPOINT"), 2, ["prompt"]),
        (("generate", "CHECKPOINT", "hi", "--no-such-flag"), 2, ["--no-such-flag"]),
    ],
)
def test_errors_are_one_line_and_no_traceback(
    checkpoint: str, arguments: tuple[str, ...], status: int, words: list[str]
) -> None:
    done = run(*(checkpoint if a == "CHECKPOINT" else a for a in arguments))
    assert done.returncode == status
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
