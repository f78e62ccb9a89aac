"""The examples and the README's Python, run as they stand."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_tiny_checkpoint

ROOT = Path(__file__).parent.parent
# Each block with names of its own, so that none leans on another one's.
RUN_BLOCKS = "import json, sys\nfor block in json.loads(sys.argv[1]): exec(block, {'__name__': '__main__'})"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stands in where it does not matter what the answers say."""
    folder = tmp_path_factory.mktemp("examples") / "tiny"
    return write_tiny_checkpoint(folder, tokenizer=True, max_position_embeddings=1024)


def run(arguments: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "error::DeprecationWarning:halimede"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_offline(tiny: Path) -> None:
    lines = run(["examples/offline.py", str(tiny)]).strip().splitlines()
    assert len(lines) >= 3
    assert lines[0].startswith("'The capital of France is' -> ")


def test_chat(smollm2_gguf: Path) -> None:
    text = run(["examples/chat.py", str(smollm2_gguf)])
    assert text.count("assistant:") == 2
    assert "Paris" in text
    assert int(re.search(r"\((\d+) of \d+ prompt tokens came from the cache\)", text)[1]) > 0


def test_batch(smollm2_gguf: Path) -> None:
    *answers, last = run(["examples/batch.py", str(smollm2_gguf)]).strip().splitlines()
    assert sorted(a.split(" -> ")[0] for a in answers) == ["Egypt", "France", "Japan"]
    # Of these the answer that rounding does not change: Paris is a close second to a description of it.
    assert "Tokyo" in next(a for a in answers if a.startswith("Japan"))
    assert last.startswith("3 requests, ")


def test_quantized(tiny: Path) -> None:
    plain, int4 = run(["examples/quantized.py", str(tiny)]).strip().splitlines()
    assert re.match(r"plain \(\d+ MiB\): ", plain)
    assert re.match(r"int4 \(\d+ MiB\): ", int4)


def test_readme(tiny: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    # The README names models of the hub.
    named = [re.sub(r'LLM\("[^"]+"', f'LLM("{tiny}"', block) for block in blocks]
    printed = run(["-c", RUN_BLOCKS, json.dumps(named)])
    assert "The capital of France is -> " in printed
    assert "\nthe prompt has " in printed


def test_the_container_recipe_uses_commands_and_options_that_exist() -> None:
    from typer.main import get_command

    from halimede.engine.cli.main import app

    text = (ROOT / "examples/container/Dockerfile").read_text()
    settings = re.findall(r'SETTINGS="([^"]*)"', text)
    assert len(set(settings)) == 1, "both stages must have the same settings"
    commands = [line.split() for line in re.findall(r"(?:^RUN|exec) (halimede [^\]\n]*)", text, re.MULTILINE)]
    assert [words[1] for words in commands] == ["warmup", "kernels", "kernels", "kernels", "generate"]
    for words in commands:
        command: Any = get_command(app)
        for word in words[1:]:
            command = getattr(command, "commands", {}).get(word, command)
        known = {option for parameter in command.params for option in parameter.opts}
        used = (
            " ".join(words).strip('"').replace("${SETTINGS}", settings[0]).replace("$SETTINGS", settings[0])
        )
        assert {word for word in used.split() if word.startswith("-")} <= known, words
