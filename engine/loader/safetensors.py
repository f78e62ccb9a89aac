"""Reads safetensors checkpoints. File format: https://huggingface.co/docs/safetensors, "Format"."""

import json
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from halimede.engine.loader.shards import check_is_weight_file, locate_tensors
from halimede.errors import ModelLoadError

_LENGTH_BYTES = 8  # the header's length, little-endian, before the header
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class SafetensorsWeights:
    """The tensors of one or more .safetensors files, each one a view into the mapped file.

    All headers are checked when it is made: ModelLoadError says which file is missing, truncated or corrupt.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        # Names in file order: whoever reads them in order reads the disk from front to back.
        self._located = locate_tensors((path, _checked_names(path)) for path in paths)
        self._stack = ExitStack()
        try:
            self._files = {path: self._stack.enter_context(_opened(path)) for path in paths}
        except BaseException:
            self._stack.close()
            raise

    def names(self) -> Collection[str]:
        """Names of all tensors, in the order they lie on disk."""
        return self._located.keys()

    def where(self, name: str) -> str:
        """Name of the file that holds the tensor."""
        return self._located[name].name

    def get(self, name: str) -> torch.Tensor:
        """One tensor, a view into the mapped file. ModelLoadError when it cannot be read."""
        path = self._located[name]
        try:
            tensor: torch.Tensor = self._files[path].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, AttributeError) as error:
            raise ModelLoadError(
                f"{path}: the tensor {name!r} cannot be read ({error}); download the file again, or update "
                "torch and safetensors if they are older than the checkpoint's data type"
            ) from error
        return tensor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._files = {}


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{path} is corrupt ({error}); download it again") from error


def _checked_names(path: Path) -> list[str]:
    """Names of the tensors in file order; ModelLoadError when header and file size do not fit."""
    header, data_bytes = _read_header(path)
    begins: dict[str, int] = {}
    promised = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            begin, end = (int(offset) for offset in entry["data_offsets"])
        except (TypeError, KeyError, ValueError):
            raise ModelLoadError(
                f"{path} is corrupt: its header has no valid data_offsets for {name!r}; download it again"
            ) from None
        begins[name] = begin
        promised = max(promised, end)
    if data_bytes < promised:
        raise ModelLoadError(
            f"{path} is truncated: its header promises {promised} bytes of tensors, the file has "
            f"{data_bytes}; download it again"
        )
    return sorted(begins, key=begins.__getitem__)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a file and the number of bytes that follow it."""
    check_is_weight_file(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES:
            raise ModelLoadError(f"{path} is truncated: it has {size} bytes, no header; download it again")
        if length > _MAX_HEADER_BYTES:
            raise ModelLoadError(
                f"{path} is not a safetensors file: it begins with a header length of {length}, more than "
                f"the {_MAX_HEADER_BYTES} allowed; it is corrupt or of another format: download it again"
            )
        data_bytes = size - _LENGTH_BYTES - length
        if data_bytes < 0:
            raise ModelLoadError(
                f"{path} is truncated: its header has {length} bytes, the file {size}; download it again"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ModelLoadError(
            f"{path} is corrupt: its header is not JSON ({error}); download it again"
        ) from None
    if not isinstance(header, dict):
        raise ModelLoadError(f"{path} is corrupt: its header is not a JSON object; download it again")
    return header, data_bytes
