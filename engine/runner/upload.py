"""Arrays of the host to the device in one copy that nobody waits for."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_Array = npt.NDArray[Any]
_WORDS = 4  # each begins at a multiple of 16 bytes


def upload_words(arrays: Sequence[npt.NDArray[np.int32]], device: torch.device) -> list[torch.Tensor]:
    """Copies of flat arrays on the device, each aligned for a kernel, by one transfer nobody waits for."""
    if not arrays:
        return []
    sizes = [len(array) for array in arrays]
    padded = [-(-size // _WORDS) * _WORDS for size in sizes]
    staging = torch.empty(sum(padded), dtype=torch.int32, pin_memory=device.type == "cuda")
    host, at = staging.numpy(), 0
    for array, size, room in zip(arrays, sizes, padded, strict=True):
        host[at : at + size] = array
        at += room
    pieces = torch.split(staging.to(device, non_blocking=True), padded)
    return [
        piece if size == room else piece[:size]
        for piece, size, room in zip(pieces, sizes, padded, strict=True)
    ]


def upload(arrays: Mapping[str, _Array], device: torch.device) -> dict[str, torch.Tensor]:
    """upload_words for arrays of any shape, of types of 32 or 64 bits."""
    flat = [np.ascontiguousarray(array).reshape(-1).view(np.int32) for array in arrays.values()]
    return {
        name: words.view(_torch_dtype(array)).view(array.shape)
        for (name, array), words in zip(arrays.items(), upload_words(flat, device), strict=True)
    }


def _torch_dtype(array: _Array) -> torch.dtype:
    return torch.from_numpy(array[:0]).dtype
