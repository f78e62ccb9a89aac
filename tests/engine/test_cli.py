"""The command, run as a user runs it."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import write_tiny_checkpoint

from halimede import errors
from halimede.engine.cli import main as cli

COMMAND = [sys.executable, "-m", "halimede.engine.cli.main"]
SHORT = ("--max-tokens", "5", "--temperature", "0", "--max-model-len", "64", "--dtype", "float32")


def run(*arguments: str, stdin: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1", **variables}
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, input=stdin, env=env, timeout=120, check=False
    )


def run_here(*arguments: str) -> object:
    """Run in this process, which spares the imports; returns the exit status."""
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    return end.value.code


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("m"), "LlamaForCausalLM", tokenizer=True))


def test_help_and_version_need_no_model() -> None:
    text = run("--help").stdout
    assert all(name in text for name in ("generate", "chat", "batch", "models", "doctor", "Exit status"))
    assert run("--version").stdout.startswith("halimede ")
    text = run("generate", "--help").stdout
    assert all(flag in text for flag in ("--max-model-len", "--block-size", "--raw", "--temperature"))
    assert "<auto|float32|bfloat16|float16>" in text  # a Literal's values are offered


@pytest.mark.parametrize("arguments", [["--help"], ["chat", "--help"], ["models"]])
def test_torch_is_not_imported_where_it_is_not_needed(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from halimede.engine.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'prompt_toolkit'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_generate_streams_the_answer_and_reports_speed_beside_it(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    done = run("generate", checkpoint, "hello", *SHORT)
    assert done.returncode == 0, done.stderr
    assert "prompt tokens" in done.stderr
    assert "prompt tokens" not in done.stdout
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert run_here("generate", checkpoint, "-", *SHORT) == 0
    assert capfd.readouterr().out.encode(errors="replace") == done.stdout.encode(errors="replace")
    assert run_here("generate", checkpoint, "hello", "--raw", *SHORT) == 0
    assert capfd.readouterr().out != done.stdout


def test_json_is_one_object_per_prompt_and_nothing_else(
    checkpoint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("hello\n")
    bad.write_text("far too long " * 100)
    arguments = ("generate", checkpoint, "hello", "-f", str(good), "-f", str(bad), "--json", *SHORT)
    assert run_here(*arguments, "--ignore-eos") == 3  # some failed
    output = capfd.readouterr()
    first, second, third = map(json.loads, output.out.splitlines())
    assert first["text"] == second["text"]  # the newline at the end of the file is not part of the prompt
    assert (first["finish_reason"], first["completion_tokens"]) == ("length", 5)
    assert first["prompt_tokens"] > 0
    assert 0 < first["time_to_first_token"] < 60
    assert first["tokens_per_second"] > 0
    assert second["file"] == str(good)
    assert "max_model_len is 64" in third["error"]
    assert "text" not in third
    assert output.err == ""


def test_several_prompts_are_answered_in_order(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / name for name in ("a.txt", "b.txt")]
    for path in files:
        path.write_text(path.stem)
    assert run_here("generate", checkpoint, "-f", str(files[0]), "-f", str(files[1]), *SHORT) == 0
    text = capsys.readouterr().out
    assert 0 <= text.index(f"==> {files[0]} <==") < text.index(f"==> {files[1]} <==")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("generate", "./nowhere", "hi"), 1, ["error:", "nowhere"]),
        (("generate", "CHECKPOINT", "hi", "--block-size", "20"), 1, ["error:", "block_size", "20"]),
        (("generate", "CHECKPOINT", "hi", "--temperature", "-1"), 1, ["error:", "temperature", "-1"]),
        (("generate", "CHECKPOINT", "", "--raw"), 1, ["error:", "empty"]),
        (("generate", "CHECKPOINT"), 2, ["no prompt", "--file"]),
        (("generate", "CHECKPOINT", "-f", "nowhere.txt"), 2, ["--file", "nowhere.txt"]),
        (("generate", "CHECKPOINT", "hi", "--no-such-flag"), 2, ["--no-such-flag"]),
        (("generate", "CHECKPOINT", "hi", "--dtype", "int3"), 2, ["--dtype", "int3", "bfloat16"]),
        (("generate", "CHECKPOINT", "hi", "--hf-overrides", "{x"), 2, ["--hf-overrides", "{x", "JSON"]),
        (("generate", "CHECKPOINT", "hi", "--hf-overrides", "[1]"), 2, ["--hf-overrides", "object"]),
        (("nonsense",), 2, ["nonsense"]),
    ],
)
def test_errors_are_told_without_a_traceback(
    checkpoint: str,
    arguments: tuple[str, ...],
    status: int,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_here(*(checkpoint if a == "CHECKPOINT" else a for a in arguments)) == status
    output = capsys.readouterr()
    assert all(word in output.err for word in words), output.err
    assert "Traceback" not in output.err
    assert output.out == ""


def test_debug_shows_the_traceback_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("--debug", "generate", "./nowhere", "hi"), ("generate", "./nowhere", "hi", "--debug")):
        assert run_here(*arguments) == 1
        errors = capsys.readouterr().err
        assert "Traceback" in errors
        assert errors.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (ZeroDivisionError("by zero"), "internal error: ZeroDivisionError: by zero; run again with --debug"),
        (
            PermissionError(13, "Permission denied", "f"),
            "error: [Errno 13] Permission denied: 'f'; run again",
        ),
        (errors.RequestError("not so"), "error: not so"),
    ],
)
def test_a_bug_is_told_apart_from_an_error(
    raised: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: object) -> None:
        raise raised

    monkeypatch.setattr(cli, "app", fail)
    assert run_here("models") == 1
    assert capsys.readouterr().err.startswith(line)


def test_ctrl_c_is_exit_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("halimede.engine.cli.models.list_supported", interrupt)
    assert run_here("models") == 130


def test_a_closed_standard_output_is_not_an_error_to_read() -> None:
    process = subprocess.Popen(
        [*COMMAND, "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # before anything is written, as far as a process that starts is concerned
    assert process.stderr.read() == ""
    process.stderr.close()
    process.wait(60)


def test_the_shell_completes_commands_flags_and_values() -> None:
    def complete(words: str) -> str:
        cword = str(len(words.split(" ")) - 1)
        variables = {"_HALIMEDE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": cword}
        script = "from halimede.engine.cli.main import app; app(prog_name='halimede')"
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            env={**os.environ, **variables},
            timeout=60,
            check=False,
        )
        return done.stdout

    assert "generate" in complete("halimede gen")
    assert "--max-model-len" in complete("halimede chat --max-m")
    assert set(complete("halimede chat m --dtype ").split()) == {"auto", "float32", "bfloat16", "float16"}
