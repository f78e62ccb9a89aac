"""Arrays of the host to the device in one copy that nobody waits for."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_Array = npt.NDArray[Any]
_ALIGNMENT = 16
_WORDS = _ALIGNMENT // 4


def upload(arrays: Mapping[str, _Array], device: torch.device) -> dict[str, torch.Tensor]:
    """Copies on the device, made by one transfer that nobody waits for, each aligned for a kernel."""
    if not arrays:
        return {}
    ends = np.cumsum([-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays.values()]).tolist()
    staging = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    starts = [0, *ends[:-1]]
    host = staging.numpy()
    for start, array in zip(starts, arrays.values(), strict=True):
        host[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    moved = staging.to(device, non_blocking=True)
    return {
        name: moved[start : start + array.nbytes].view(_torch_dtype(array)).view(array.shape)
        for start, (name, array) in zip(starts, arrays.items(), strict=True)
    }


def _torch_dtype(array: _Array) -> torch.dtype:
    return torch.from_numpy(array[:0]).dtype


def upload_words(arrays: Sequence[npt.NDArray[np.int32]], device: torch.device) -> list[torch.Tensor]:
    """Copies of flat int32 arrays on the device, as upload makes them; this one is for every step."""
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
