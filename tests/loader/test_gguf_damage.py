"""A damaged file must end in an error that names it, never in another exception or a hang."""

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import base_metadata, random_tensors, write_gguf

from halimede.engine.loader.gguf import GgufWeights, read_gguf_config
from halimede.engine.loader.gguf_file import open_gguf
from halimede.engine.loader.gguf_tokenizer import load_gguf_tokenizer
from halimede.errors import ModelLoadError, UnsupportedQuantizationError


def read_weights(path: Path) -> None:
    weights = GgufWeights([path])
    for name in weights.names():
        weights.get(name)


READERS: list[Callable[[Path], object]] = [
    lambda path: read_gguf_config([path]),
    read_weights,
    load_gguf_tokenizer,
]


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    metadata = base_metadata() | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "c", "ab", "Ġ", "<|end|>", *(f"t{i}" for i in range(34))],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [1, 1, 1, 1, 1, 3] + [1] * 34,
        "tokenizer.chat_template": "{{ messages }}",
    }
    return write_gguf(tmp_path / "healthy.gguf", metadata, random_tensors(tied=True))


def data_offset(path: Path) -> int:
    return int(gguf.GGUFReader(path).data_offset)


def test_healthy(healthy: Path) -> None:
    for reader in READERS:
        reader(healthy)


@pytest.mark.parametrize("reader", READERS, ids=["config", "weights", "tokenizer"])
def test_truncated(healthy: Path, tmp_path: Path, reader: Callable[[Path], object]) -> None:
    content, start = healthy.read_bytes(), data_offset(healthy)
    cut = tmp_path / "cut.gguf"
    # The whole header, metadata and tensor list in steps, then tensor data.
    for length in [
        1,
        3,
        4,
        7,
        8,
        15,
        16,
        23,
        24,
        *range(25, start, 13),
        start - 1,
        start,
        start + 1,
        len(content) - 4,
    ]:
        cut.write_bytes(content[:length])
        with pytest.raises(ModelLoadError, match=r"cut\.gguf is truncated: .*download it again"):
            reader(cut)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; download it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "is a Git-LFS pointer.*git lfs pull",
        ),
        (b"<!DOCTYPE html><html>not found</html>", r"is not a GGUF: it starts with b'<!DO'"),
        (b"PK\x03\x04" + b"\0" * 100, "is not a GGUF"),
        (b"GGUF\x01\0\0\0" + b"\0" * 100, "is GGUF version 1, known are 2 and 3"),
        (b"GGUF\xff\xff\xff\xff" + b"\0" * 100, "is GGUF version 4294967295"),
        (b"GGUF\0\0\0\x03" + b"\0" * 100, "is a big-endian GGUF"),
        (b"GGUF", "is truncated"),
        (b"GGUF\x03\0\0\0" + struct.pack("<QQ", 2**62, 0) + b"\0" * 100, "is truncated"),
        (b"GGUF\x03\0\0\0" + struct.pack("<QQ", 0, 2**62) + b"\xff" * 100, "is truncated"),
        (
            b"GGUF\x03\0\0\0" + struct.pack("<QQQ", 0, 1, 1) + b"k\x63\0\0\0" + b"\0" * 64,
            "metadata is corrupt",
        ),
        (
            b"GGUF\x03\0\0\0" + struct.pack("<QQQ", 0, 1, 1) + b"\xff\x04\0\0\0" + b"\0" * 64,
            "metadata is corrupt",
        ),
    ],
)
def test_not_a_gguf(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=rf"bad\.gguf.*{message}"):
        open_gguf(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"none\.gguf cannot be read: No such file"):
        open_gguf(tmp_path / "none.gguf")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(ModelLoadError, match=r"folder\.gguf cannot be read: Is a directory"):
        open_gguf(tmp_path / "folder.gguf")


@pytest.mark.parametrize(
    "item_type", [gguf.GGUFValueType.STRING, gguf.GGUFValueType.UINT8, gguf.GGUFValueType.ARRAY]
)
def test_array_of_absurd_length(tmp_path: Path, item_type: gguf.GGUFValueType) -> None:
    path = tmp_path / "bad.gguf"
    key = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, item_type, 2**60)
    path.write_bytes(b"GGUF\x03\0\0\0" + struct.pack("<QQ", 0, 1) + key + b"\0" * 4096)
    with pytest.raises(ModelLoadError, match=r"bad\.gguf"):
        open_gguf(path)


def test_unknown_tensor_type(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "new.gguf", {}, {"token_embd.weight": np.zeros((2, 32), np.float32)})
    content = path.read_bytes()
    at = content.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
    path.write_bytes(content[:at] + struct.pack("<I", 999) + content[at + 4 :])
    with pytest.raises(UnsupportedQuantizationError, match=r"new\.gguf.*999.*pip install -U gguf"):
        open_gguf(path)


def test_damaged_bytes(healthy: Path, tmp_path: Path) -> None:
    """One to four bytes of the metadata changed: it loads all the same, or the error names the file."""
    content, start = healthy.read_bytes(), data_offset(healthy)
    rng = np.random.default_rng(0)
    damaged = tmp_path / "damaged.gguf"
    messages: list[str | None] = []
    for _ in range(150):
        changed = bytearray(content)
        for position in rng.integers(0, start, rng.integers(1, 5)):
            changed[position] = rng.choice([0, 1, 127, 255, rng.integers(256)])
        damaged.write_bytes(changed)
        for reader in READERS:
            try:
                reader(damaged)
                messages.append(None)
            except ModelLoadError as error:
                messages.append(str(error))
    errors = [message for message in messages if message is not None]
    assert all("damaged.gguf" in message for message in errors)
    assert min(len(errors), len(messages) - len(errors)) > 60
