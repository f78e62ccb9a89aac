"""Safetensors checkpoints: read as views, and every damage is named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from halimede.engine.loader.safetensors import SafetensorsWeights
from halimede.errors import ModelLoadError


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"b": torch.arange(6.0).view(2, 3), "a": torch.ones(4, dtype=torch.bfloat16)}, path)
    return path


def _error(path: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        SafetensorsWeights([path])
    message = str(caught.value)
    assert str(path) in message
    return message


def test_reads_every_dtype_and_shape(tmp_path: Path) -> None:
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
    dtypes += [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool]
    tensors = {str(dtype): torch.tensor([[0, 1], [1, 0], [1, 1]]).to(dtype) for dtype in dtypes}
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.empty(0, 4)
    save_file(tensors, tmp_path / "model.safetensors")
    with SafetensorsWeights([tmp_path / "model.safetensors"]) as source:
        assert set(source.names()) == set(tensors)
        for name, tensor in tensors.items():
            assert source.get(name).dtype == tensor.dtype
            assert source.get(name).shape == tensor.shape
            assert torch.equal(source.get(name).float(), tensor.float())


def test_names_come_in_file_order_and_know_their_shard(tmp_path: Path) -> None:
    first, second = (
        tmp_path / "model-00001-of-00002.safetensors",
        tmp_path / "model-00002-of-00002.safetensors",
    )
    save_file({"z": torch.ones(2), "y": torch.ones(2)}, first)
    save_file({"a": torch.zeros(2)}, second)
    with SafetensorsWeights([first, second]) as source:
        assert list(source.names()) == ["y", "z", "a"]
        assert source.where("z") == first.name
        assert source.where("a") == second.name
        assert source.get("a").tolist() == [0, 0]


def test_a_tensor_is_a_view_that_outlives_the_source(shard: Path) -> None:
    with SafetensorsWeights([shard]) as source:
        tensor = source.get("b")
    assert str(shard) in _mapping_of(tensor)
    assert tensor.flatten().tolist() == [0, 1, 2, 3, 4, 5]


def _mapping_of(tensor: torch.Tensor) -> str:
    """The line of /proc/self/maps that the tensor's memory belongs to."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(address, 16) for address in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return line
    return ""


def test_missing_file(tmp_path: Path) -> None:
    message = _error(tmp_path / "model.safetensors")
    assert "is missing" in message
    assert "download" in message


def test_truncated_data(shard: Path) -> None:
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    message = _error(shard)
    assert "is truncated: its header promises 32 bytes of tensors, the file has 22" in message
    assert "download it again" in message


@pytest.mark.parametrize("kept", [5, 40])
def test_truncated_header(shard: Path, kept: int) -> None:
    shard.write_bytes(shard.read_bytes()[:kept])
    message = _error(shard)
    assert "is truncated" in message
    assert str(kept) in message
    assert "download it again" in message


def test_empty_file(shard: Path) -> None:
    shard.write_bytes(b"")
    message = _error(shard)
    assert "is empty" in message
    assert "download it again" in message


def test_git_lfs_pointer(shard: Path) -> None:
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n")
    message = _error(shard)
    assert "git-lfs pointer" in message
    assert "git lfs pull" in message


def test_some_other_format(shard: Path) -> None:
    shard.write_text("<!DOCTYPE html><html><body>Sign in to the network</body></html>")
    message = _error(shard)
    assert "is not a safetensors file" in message
    assert "download it again" in message


@pytest.mark.parametrize(
    "header", [b"{broken", b"\xff\xfe\x00\x01", b"[1, 2]", b'{"a": {"dtype": "F32"}}', b'{"a": 3}']
)
def test_corrupt_header(shard: Path, header: bytes) -> None:
    shard.write_bytes(len(header).to_bytes(8, "little") + header + bytes(32))
    message = _error(shard)
    assert "is corrupt" in message
    assert "header" in message
    assert "download it again" in message


def test_header_that_contradicts_itself(shard: Path) -> None:
    header = b'{"a": {"dtype": "F32", "shape": [100], "data_offsets": [0, 8]}}'
    shard.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    message = _error(shard)
    assert "is corrupt" in message
    assert "download it again" in message


def test_surplus_bytes(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes() + b"more")
    message = _error(shard)
    assert "is corrupt" in message
    assert "download it again" in message


def test_every_header_is_checked_before_anything_is_read(shard: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.safetensors"
    save_file({"c": torch.ones(4)}, second)
    second.write_bytes(second.read_bytes()[:-4])
    with pytest.raises(ModelLoadError, match=r"second\.safetensors is truncated"):
        SafetensorsWeights([shard, second])


def test_same_tensor_in_two_shards(shard: Path, tmp_path: Path) -> None:
    second = tmp_path / "copy.safetensors"
    save_file({"a": torch.ones(4)}, second)
    with pytest.raises(
        ModelLoadError, match=r"'a' is both in model\.safetensors and in copy\.safetensors"
    ) as caught:
        SafetensorsWeights([shard, second])
    assert "remove the file" in str(caught.value)


def test_tensor_that_cannot_be_read(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreadable:
        def get_tensor(self, name: str) -> torch.Tensor:
            raise OSError("input/output error")

    with SafetensorsWeights([shard]) as source:
        monkeypatch.setitem(source._files, shard, Unreadable())
        with pytest.raises(
            ModelLoadError, match=r"model\.safetensors: the tensor 'a' cannot be read"
        ) as caught:
            source.get("a")
    assert "download the file again" in str(caught.value)
