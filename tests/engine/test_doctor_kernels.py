"""What `halimede doctor` says of the kernel cache."""

import json
import sys
from pathlib import Path

import pytest
import torch
from cheap_kernels import cheap

from halimede.engine.cli.doctor_kernels import find_kernels
from halimede.engine.cli.main import main
from halimede.kernels.build import build
from halimede.kernels.specialise import TRITON_VERSION
from halimede.kernels.store import KernelStore

COUNTERS = {"jit_compiles_total": 0, "kernel_cache_hits_total": 0, "jit_compile_seconds_total": 0.0}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KernelStore:
    monkeypatch.setenv("HALIMEDE_KERNEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return KernelStore(tmp_path / "cache")


def test_doctor_shows_the_folder_and_its_kernels(
    cache: KernelStore, capsys: pytest.CaptureFixture[str]
) -> None:
    for one in (cheap(), cheap(bias=True), cheap("gfx942")):
        cache.write(*build(one))
    kernels = f"1 for gfx942 (Triton {TRITON_VERSION}), 2 for sm_90 (Triton {TRITON_VERSION})"
    with pytest.raises(SystemExit):
        main(["doctor", "--json"])
    section = json.loads(capsys.readouterr().out)["kernels"]
    folder = section.pop("kernel cache")
    assert folder.startswith(f"{cache.folder} (")
    assert "free on its disk)" in folder
    assert section == {"cached kernels": kernels, **COUNTERS}
    with pytest.raises(SystemExit):
        main(["doctor"])
    text = capsys.readouterr().out
    for fact in (str(cache.folder), kernels, *COUNTERS):
        assert fact in text


def test_an_empty_cache_names_the_command(cache: KernelStore) -> None:
    found = find_kernels()
    assert found.problems == []
    assert "(not there yet; " in found.facts["kernel cache"]
    assert found.facts["cached kernels"] == "none; halimede warmup builds them"
    assert not cache.folder.exists()


def test_without_triton_it_says_so(cache: KernelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    found = find_kernels()
    assert found.problems == []
    assert "Triton cannot be imported" in found.facts["cached kernels"]
