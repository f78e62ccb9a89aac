"""torch.save checkpoints: mapped where they can be, tensors only, and every damage is named."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from halimede.engine.loader.torch_bin import TorchBinWeights
from halimede.errors import ModelLoadError


class Evil:
    """A pickle that would run a command when it is loaded."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.victim),))


def _save(content: object, path: Path, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def _error(path: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        TorchBinWeights([path])
    message = str(caught.value)
    assert str(path) in message
    return message


@pytest.fixture(params=[False, True], ids=["zip", "legacy"])
def legacy(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_reads_tensors_of_two_shards_in_any_order(tmp_path: Path, legacy: bool) -> None:
    shards = [
        _save(
            {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}, tmp_path / "1.bin", legacy
        ),
        _save({"c": torch.zeros(2, dtype=torch.float16)}, tmp_path / "2.bin", legacy),
    ]
    with TorchBinWeights(shards) as source:
        assert list(source.names()) == ["a", "b", "c"]
        assert source.where("c") == "2.bin"
        for _ in range(2):
            assert source.get("c").dtype == torch.float16
            assert source.get("a").tolist() == [0, 1, 2]
            assert source.get("b").tolist() == [[1, 1], [1, 1]]


def test_a_zip_is_mapped_and_a_legacy_file_is_held_one_at_a_time(tmp_path: Path) -> None:
    mapped = _save({"a": torch.ones(5)}, tmp_path / "zip.bin")
    old = [_save({name: torch.ones(5)}, tmp_path / f"{name}.bin", legacy=True) for name in "bc"]
    with TorchBinWeights([mapped, *old]) as source:
        assert source.get("a").tolist() == [1] * 5
        assert str(mapped) in Path("/proc/self/maps").read_text()
        source.get("b")
        assert source._legacy == {}


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
def test_nested_state_dict(tmp_path: Path, wrapper: str) -> None:
    content = {wrapper: {"a": torch.ones(2), "steps": 7}, "epoch": 3}
    with TorchBinWeights([_save(content, tmp_path / "model.pt")]) as source:
        assert list(source.names()) == ["a"]


@pytest.mark.parametrize("nested", [False, True])
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, legacy: bool, nested: bool) -> None:
    victim = tmp_path / "made-by-the-pickle"
    content = {"a": torch.ones(2), "x": {"y": Evil(victim)}} if nested else Evil(victim)
    message = _error(_save(content, tmp_path / "pytorch_model.bin", legacy))
    assert "refused by torch.load(weights_only=True)" in message
    assert "mkdir" in message
    assert "safetensors" in message
    assert not victim.exists()


def test_a_plain_pickle_is_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps(Evil(tmp_path / "victim")))
    message = _error(path)
    assert "is not a file of torch.save" in message
    assert "safetensors" in message
    assert not (tmp_path / "victim").exists()


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    message = _error(_save(nn.Linear(2, 2), tmp_path / "model.pt"))
    assert "refused" in message
    assert "Linear" in message


def test_missing_file(tmp_path: Path) -> None:
    message = _error(tmp_path / "pytorch_model.bin")
    assert "is missing" in message
    assert "download" in message


@pytest.mark.parametrize("kept", [30, 0.5, -8])
def test_truncated_file(tmp_path: Path, legacy: bool, kept: float) -> None:
    path = _save({"a": torch.ones(1000)}, tmp_path / "pytorch_model.bin", legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    message = _error(path)
    assert "truncated or corrupt" in message
    assert "download it again" in message


def test_corrupt_pickle_inside(tmp_path: Path, legacy: bool) -> None:
    path = _save({"some_weight": torch.ones(10)}, tmp_path / "pytorch_model.bin", legacy)
    content = path.read_bytes()
    at = content.index(b"some_weight")
    path.write_bytes(content[: at - 3] + b"\xff\xff\xff" + content[at:])
    message = _error(path)
    assert "corrupt" in message
    assert "download it again" in message


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html></html>", bytes(range(200, 256)) * 4])
def test_some_other_format(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    message = _error(path)
    assert "is not a file of torch.save" in message
    assert "download it again" in message


def test_empty_file_and_git_lfs_pointer(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"")
    assert "is empty; download it again" in _error(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in _error(path)


def test_same_tensor_in_two_shards(tmp_path: Path) -> None:
    shards = [_save({"a": torch.ones(1)}, tmp_path / f"{i}.bin") for i in range(2)]
    with pytest.raises(ModelLoadError, match=r"'a' is both in 0\.bin and in 1\.bin"):
        TorchBinWeights(shards)


@pytest.mark.parametrize(
    ("content", "fact"), [([torch.ones(1)], "holds a list"), ({"lr": 0.1}, "no tensors")]
)
def test_not_a_state_dict(tmp_path: Path, content: object, fact: str) -> None:
    message = _error(_save(content, tmp_path / "model.pt"))
    assert fact in message
