"""Memory for weights on a CPU: large pages, so that address translation does not hold up reading them.

A weight matrix of a small model is a few MiB; alone it would rarely cover an aligned page of 2 MiB. Weights
are therefore cut one after the other from chunks of many pages. Where the system has no large pages to give,
the chunks are plain memory.
"""

import contextlib
import ctypes
import math
import mmap
import sys

import torch

_CHUNK = 64 << 20
_PAGE = 2 << 20
_ALIGNMENT = 64  # bytes: a cache line, and what torch gives its own tensors


class WeightMemory:
    """Cuts tensors from chunks; a chunk is freed with the last of its tensors."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor on the device."""
        if self._device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=self._device)
        size = math.prod(shape) * dtype.itemsize
        if self._used + size > len(self._chunk):
            self._chunk, self._used = _new_chunk(max(size, _CHUNK)), 0
        memory = self._chunk[self._used : self._used + size]
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return memory.view(dtype).view(shape)


def _new_chunk(size: int) -> torch.Tensor:
    """Bytes from an address that a large page can begin at."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    chunk = torch.frombuffer(memory, dtype=torch.uint8)
    start = -chunk.data_ptr() % _PAGE
    return chunk[start : start + size]


def return_free_memory() -> None:
    """Give the system back what malloc keeps of freed memory: tens of MiB of what weights were unpacked in.

    Only glibc keeps so much, and has a function for it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
