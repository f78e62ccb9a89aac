"""`halimede chat`: in a terminal, driven as a user does it, and from a pipe."""

import io
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from tiny_models import write_tiny_checkpoint

from halimede.engine.cli.main import main

COMMAND = ["-m", "halimede.engine.cli.main", "chat"]
PROMPT = ">>> "


class Terminal:
    """A chat in a pseudo-terminal of 160 columns."""

    def __init__(self, home: Path, *arguments: str) -> None:
        # The terminal's size is what counts here. rich believes these two more, and a worker of pytest-xdist
        # has them: its parent has imported readline, which sets them for child processes.
        env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        env |= {
            "HOME": str(home),
            "TERM": "xterm",
            "NO_COLOR": "1",
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "OMP_NUM_THREADS": "1",
        }
        with warnings.catch_warnings():  # forking is safe here: the child calls exec at once
            warnings.simplefilter("ignore", DeprecationWarning)
            self.child = pexpect.spawn(
                sys.executable,
                [*COMMAND, *arguments],
                env=env,
                dimensions=(50, 160),
                timeout=60,
                encoding="utf-8",
            )

    def wait_for(self, pattern: str) -> "re.Match[str]":
        self.child.expect(pattern)
        match = self.child.match
        assert isinstance(match, re.Match)
        return match

    def say(self, *lines: str) -> None:
        """Type lines, each ended with Enter, at the next prompt."""
        self.wait_for(re.escape(PROMPT))
        for line in lines:
            self.child.send(line + "\r")

    def ask(self, *lines: str) -> "re.Match[str]":
        """Send a message; groups of the result: prompt tokens, cached ones, new tokens, how it ended."""
        self.say(*lines)
        return self.wait_for(
            r"\[(\d+) prompt tokens(?: \((\d+) cached\))?, first token after [\d.]+ s; (\d+) tokens, "
            r"(?:[\d.]+ tok/s|-); (?:finished: )?(\w+)\]"
        )

    def leave(self, keys: str) -> int | None:
        self.wait_for(re.escape(PROMPT))
        self.child.send(keys)
        self.child.expect(pexpect.EOF)
        self.child.close()
        status: int | None = self.child.exitstatus
        return status


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("m"), "LlamaForCausalLM", tokenizer=True)


@pytest.fixture
def tiny(checkpoint: Path, tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path, str(checkpoint), "--temperature", "0", "--max-tokens", "4", "--ignore-eos")
    yield terminal
    terminal.child.close(force=True)


def run_piped(monkeypatch: pytest.MonkeyPatch, *arguments: str, stdin: str) -> object:
    """Run in this process, which spares the imports; returns the exit status."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    with pytest.raises(SystemExit) as end:
        main(["chat", *arguments])
    return end.value.code


def prompt_lengths(checkpoint: Path, *conversations: list[str]) -> list[int]:
    """Tokens of conversations' prompts: user and assistant by turns."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    lengths = []
    for texts in conversations:
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        lengths.append(len(tokenizer.encode(rendered, add_special_tokens=False)))
    return lengths


def test_messages_of_several_lines(tiny: Terminal, checkpoint: Path) -> None:
    block, joined, pasted = prompt_lengths(checkpoint, ["one\ntwo"], ["three\nfour five"], ["a\\\nb\n\nc"])
    assert int(tiny.ask('"""one', 'two"""')[1]) == block
    tiny.say("/reset")
    assert int(tiny.ask("three\\", "four five")[1]) == joined
    tiny.say("/reset")
    assert int(tiny.ask("\x1b[200~a\\\rb\r\rc\x1b[201~")[1]) == pasted  # a paste, as terminals send it
    assert tiny.leave("\x04") == 0


def test_commands(tiny: Terminal, tmp_path: Path) -> None:
    first = tiny.ask("hello there")
    assert (first[2], first[3], first[4]) == (None, "4", "length")
    tiny.say("/params max_tokens=7 temperature=0.5")
    tiny.wait_for(r"max_tokens +7\r")
    tiny.say("/params max_tokens=9 temperature=-1")
    tiny.wait_for("error: .*temperature=-1")
    second = tiny.ask("and more")
    assert int(second[2]) > 0  # the conversation is rendered anew, and the prefix cache has its beginning
    assert second[3] == "7"  # nothing of the refused change has stayed
    tiny.say("word " * 300)
    tiny.wait_for("error: the conversation with this message has .*max_model_len is 256.*/reset")
    assert int(tiny.ask("hello there")[1]) < 256  # the conversation is as it was
    tiny.say("/system Be brief.")
    tiny.wait_for("system message set")
    tiny.say("/system")
    tiny.wait_for("system message: Be brief.")
    tiny.say("/reset")
    tiny.wait_for(r"forgotten \(3 turns\)")
    with_system = tiny.ask("hello there")
    assert int(with_system[1]) > int(first[1])
    tiny.say("/nonsense")
    tiny.wait_for("error: unknown command '/nonsense'")
    tiny.wait_for(re.escape(PROMPT))
    tiny.child.send("\x03")
    tiny.wait_for("Ctrl-D or /bye ends the chat")
    assert tiny.leave("/bye\r") == 0
    history = tmp_path / ".local" / "state" / "halimede" / "chat_history"
    assert "+hello there" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def test_ctrl_c_stops_the_answer_and_not_the_chat(smollm2_gguf: Path, tmp_path: Path) -> None:
    options = ("--temperature", "0", "--ignore-eos", "--max-tokens", "4000", "--max-model-len", "4096")
    terminal = Terminal(tmp_path, str(smollm2_gguf), *options, "--no-history")
    try:
        terminal.say("Tell me a long story.")
        # The answer follows the end of line editing; so much of it fills a block of the prefix cache,
        # whatever it says, and thousands of tokens are still to come.
        terminal.wait_for(r"\x1b\[\?2004l[^\x1b]{200}")
        terminal.child.sendintr()
        stopped = terminal.wait_for(r"\[(\d+) prompt tokens.*; (\d+) tokens, .*; stopped\]")
        said = int(stopped[1]) + int(stopped[2])
        terminal.say("/params max_tokens=3")
        again = terminal.ask("Go on.")
        assert int(again[1]) >= said  # what was said is part of the conversation
        assert int(again[2]) > int(stopped[1])  # and of the prefix cache
        assert (again[3], again[4]) == ("3", "length")
        assert terminal.leave("\x04") == 0
        assert not (tmp_path / ".local").exists()
    finally:
        terminal.child.close(force=True)


def test_a_pipe_holds_one_message_per_line(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (str(checkpoint), "--temperature", "0", "--max-tokens", "4", "--ignore-eos")
    stdin = 'hello\n\n"""one\ntwo"""\n/reset\nhello'
    assert run_piped(monkeypatch, *options, stdin=stdin) == 0
    output = capsys.readouterr()
    described = re.findall(r"\[(\d+) prompt tokens.*?(\d+) tokens, ", output.err)
    assert [new for _, new in described] == ["4", "4", "4"]
    assert described[0][0] == described[2][0]
    assert "\x1b" not in output.err
    assert ">>>" not in output.out


def test_a_message_that_fails_in_a_pipe_shows_in_the_exit_status(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin = f"/params n=2\n{'word ' * 400}\nhello\n"
    assert run_piped(monkeypatch, str(checkpoint), "--max-tokens", "2", stdin=stdin) == 1
    errors = capsys.readouterr().err
    assert "error: /params has no option 'n'" in errors
    assert "error: the message has" in errors
    assert "prompt tokens" in errors  # the next message was answered all the same


def test_a_model_without_a_chat_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = write_tiny_checkpoint(tmp_path / "m", "LlamaForCausalLM", tokenizer=True)
    for template in bare.glob("chat_template*"):
        template.unlink()
    assert run_piped(monkeypatch, str(bare), stdin="hello\n") == 1
    assert re.search("error: .* has no chat template.*halimede generate .* --raw", capsys.readouterr().err)
    options = ("--chat-template", "{{ messages[0].content }}", "--max-tokens", "2")
    assert run_piped(monkeypatch, str(bare), *options, stdin="hello") == 0
