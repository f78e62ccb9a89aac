"""`halimede kernels`."""

import json
import re
import sys
from pathlib import Path

import pytest

from halimede.engine.cli.main import main
from halimede.kernels.spec import all_kernels


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def run(*arguments: str) -> object:
    with pytest.raises(SystemExit) as end:
        main(["kernels", *arguments])
    return end.value.code


def test_list_has_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--json") == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert listed.keys() == all_kernels().keys()
    assert "hidden 4096" in listed["rms_norm"]["signatures"]
    assert run("list") == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert {name for name, _summary, _number in lines} == listed.keys()


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_inspect_shows_the_machine_code(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    which = ("inspect", "rms_norm", "--target", target, "--signature", "hidden 4096")
    assert run(*which, "--json") == 0
    (code,) = json.loads(capsys.readouterr().out)
    assert (code["target"], code["signature"], code["spill_bytes"]) == (target, "hidden 4096", 0)
    assert code["registers"] > 0
    assert code["mix"]["global_loads_128"] > 0
    assert run(*which) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split("\t")[:2] == ["hidden 4096", "rms_norm"]
    assert str(code["registers"]) in line.split("\t")


def test_on_a_terminal_there_are_tables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    assert run("list") == 0
    assert run("inspect", "rms_norm", "--target", "gfx942", "--signature", "hidden 576") == 0
    text = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert "Summary" in text
    assert "Registers" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("target", "asm", "held"),
    [
        ("sm_90", "ptx", ".visible .entry"),
        ("sm_90", "sass", "LDG.E.128"),
        ("sm_90", "ttgir", "tt.func"),
        ("gfx942", "amdgcn", "amdhsa.kernels"),
    ],
)
def test_text_of_every_level(target: str, asm: str, held: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", "rms_norm", "--target", target, "--asm", asm) == 0
    assert held in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("rms_nrm", "--target", "sm_90"), "did you mean 'rms_norm'"),
        (("rms_norm", "--target", "sm90"), "did you mean 'sm_90'"),
        (("rms_norm", "--target", "sm_90", "--signature", "hiden 4096"), "did you mean 'hidden 4096'"),
        (("rms_norm", "--target", "gfx942", "--asm", "ptx"), "no ptx for gfx942; it has: ttgir, amdgcn"),
    ],
)
def test_what_is_unknown_is_told(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", *arguments) == 1
    assert said in capsys.readouterr().err


def test_without_triton_the_remedy_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert run("list") == 1
    assert "need Triton" in capsys.readouterr().err
