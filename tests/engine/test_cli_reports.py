"""`halimede models` and `halimede doctor`, and what the shell completes models to."""

import json
import re
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from halimede.engine.cli import doctor as doctor_module
from halimede.engine.cli import machine
from halimede.engine.cli.completion import complete_model
from halimede.engine.cli.main import main
from halimede.engine.executor import device
from halimede.engine.layers.rope_config import RopeType
from halimede.engine.models.registry import SUPPORTED_ARCHITECTURES


def run(*arguments: str) -> object:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return end.value.code


def test_models_lists_what_the_registries_have(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("models", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    by_name = {entry["name"]: entry for entry in listed["architectures"]}
    assert by_name.keys() == SUPPORTED_ARCHITECTURES.keys()
    assert all(entry["families"] for entry in by_name.values())
    assert "SmolLM" in by_name["LlamaForCausalLM"]["families"]
    assert by_name["LlamaForCausalLM"]["gguf"] == ["llama"]
    assert {"Q4_0", "Q4_K", "Q8_0", "F16", "BF16"} <= set(listed["gguf_types"])
    assert "I32" not in listed["gguf_types"]
    assert {"awq", "gptq", "compressed-tensors"} <= set(listed["quantization"])
    assert listed["online_quantization"] == ["int4", "int8", "fp8"]
    assert tuple(listed["rope_types"]) == get_args(RopeType)
    assert run("models") == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert {line[1] for line in lines if line[0] == "architecture"} == by_name.keys()


def test_models_on_a_terminal_is_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    assert run("models") == 0
    text = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert "Architecture" in text
    assert max(map(len, text.splitlines())) <= 60


@pytest.mark.parametrize("native", [True, False])
def test_doctor_says_what_a_cpu_computes_in(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "cpu_has_bfloat16", lambda: native)
    choice = doctor_module.examine()[0]["choice"]
    assert ("computed in float32" in choice["dtype of a bfloat16 checkpoint"]) is not native
    assert choice["dtype of a float16 checkpoint"].startswith("bfloat16" if native else "float16, computed")


def test_doctor_says_what_would_be_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret@proxy.example:3128/")
    monkeypatch.setattr(doctor_module, "hub_cache", lambda: tmp_path / "hub")
    sections, problems = doctor_module.examine()
    assert problems == []
    assert sections["versions"]["torch"]
    assert sections["choice"]["dtype of a bfloat16 checkpoint"].startswith("bfloat16")
    assert sections["environment"]["HTTPS_PROXY"] == "http://***@proxy.example:3128/"
    assert str(tmp_path / "hub") in sections["caches"]["hugging face"]
    assert run("doctor") == 0
    assert "secret" not in capsys.readouterr().out
    assert run("doctor", "--json") == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


def test_doctor_tells_what_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        machine.importlib.metadata, "requires", lambda name: ["no-such-package>=3", "numpy<1"]
    )
    assert run("doctor") == 1
    broken = [line for line in capsys.readouterr().out.splitlines() if line.startswith("broken:")]
    assert len(broken) == 2
    assert "no-such-package is not installed" in broken[0]
    assert "pip install 'numpy<1'" in broken[1]


def test_a_cache_that_cannot_be_written_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blob").write_bytes(b"x" * 2048)
    found = machine.find_folder("cache", tmp_path, "HF_HOME")
    assert found.problems == []
    assert "2.00 KiB" in found.facts["cache"]
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)  # root may write everywhere
    found = machine.find_folder("cache", tmp_path / "not" / "there", "HF_HOME")
    assert "set HF_HOME" in found.problems[0]


def test_a_cpu_is_read_from_cpuinfo(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: Some CPU\nflags\t\t: fpu avx2 amx_bf16\n")
    facts = machine.find_system(cpuinfo).facts
    assert facts["cpu"] == "Some CPU"
    assert facts["instruction sets"] == ["avx2", "amx_bf16"]
    assert machine.find_system(tmp_path / "nothing").facts["cpu"]


def test_models_are_completed_from_cache_and_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"
    for name in ("models--meta--Llama-3", "models--gpt2", "datasets--meta--x"):
        (hub / name).mkdir(parents=True)
    (tmp_path / "metal.gguf").touch()
    (tmp_path / "metadata.json").touch()
    (tmp_path / "meta-models").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("halimede.engine.cli.completion.hub_cache", lambda: hub)
    assert complete_model("met") == ["meta/Llama-3", "meta-models/", "metal.gguf"]
    assert complete_model("meta/") == ["meta/Llama-3"]
    assert complete_model("./met") == []  # the shell completes paths itself
    assert "gpt2" in complete_model("")
