"""Reads PyTorch checkpoints (.bin, .pt): the files of torch.save, with nothing but tensors let in."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from halimede.engine.loader.shards import check_is_weight_file, locate_tensors
from halimede.errors import ModelLoadError

_ZIP_MAGIC = b"PK\x03\x04"
# How torch.save began its files before 1.6, and still does without _use_new_zipfile_serialization.
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_WRAPPERS = ("state_dict", "model", "module")  # keys under which training scripts put the state dict


class TorchBinWeights:
    """The tensors of one or more torch.save files.

    Zip files (torch 1.6 and newer) are mapped, not read: their tensors are views. Older files cannot be
    mapped; one of them at a time is held in memory, and a tensor that has been handed out is let go of.
    Raises ModelLoadError when a file is missing, truncated, corrupt or holds more than tensors.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._mapped: dict[Path, dict[str, torch.Tensor]] = {}
        self._legacy: dict[str, torch.Tensor] = {}  # what is left of the legacy file read last
        self._located = locate_tensors((path, self._open(path)) for path in paths)

    def names(self) -> Collection[str]:
        """Names of all tensors, file after file."""
        return self._located.keys()

    def where(self, name: str) -> str:
        """Name of the file that holds the tensor."""
        return self._located[name].name

    def get(self, name: str) -> torch.Tensor:
        """One tensor: a view into the mapped file, or read into memory if the file is a legacy one."""
        path = self._located[name]
        if path in self._mapped:
            return self._mapped[path][name]
        if name not in self._legacy:
            self._legacy = {}  # before the next file is read: never two in memory
            self._legacy = _load(path, mmap=False)
        return self._legacy.pop(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mapped = {}
        self._legacy = {}

    def _open(self, path: Path) -> list[str]:
        if _is_legacy(path):
            self._legacy = {}
            self._legacy = _load(path, mmap=False)
            return list(self._legacy)
        self._mapped[path] = _load(path, mmap=True)
        return list(self._mapped[path])


def _is_legacy(path: Path) -> bool:
    check_is_weight_file(path)
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_MAGIC))
    if start.startswith(_ZIP_MAGIC):
        return False
    if start == _LEGACY_MAGIC:
        return True
    raise ModelLoadError(
        f"{path} is not a file of torch.save: it begins with {start!r}; it is corrupt, or a plain pickle, "
        "which may run code and is not read: download it again, or convert it to safetensors"
    )


def _load(path: Path, mmap: bool) -> dict[str, torch.Tensor]:
    """The state dict in a file, name to tensor."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        refused = re.search(r"unsupported (?:global|class|operand)[^\n]*", str(error), re.IGNORECASE)
        if refused:
            raise ModelLoadError(
                f"{path} was refused by torch.load(weights_only=True): {refused[0][:200]}; it holds objects "
                "other than tensors, which could run code: use a safetensors checkpoint, or convert this one "
                "where you trust it"
            ) from None
        raise ModelLoadError(
            f"{path} is truncated or corrupt ({type(error).__name__}: {_first_sentence(error)}); download it "
            "again"
        ) from error
    return _tensors(content, path)


def _first_sentence(error: Exception) -> str:
    return str(error).partition(". ")[0].partition("\n")[0][:200]


def _tensors(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, which may lie under a key of its own."""
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise ModelLoadError(
            f"{path} holds a {type(content).__name__}, not a state dict; save model.state_dict() and load "
            "that"
        )
    # Whatever else training scripts keep there (step counts, names) cannot be a weight.
    tensors = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ModelLoadError(
            f"{path} holds no tensors, only the keys {sorted(map(str, content))[:5]}; is it a checkpoint of "
            "a model?"
        )
    return tensors
