"""Kernels that measure a card and nothing else: one only reads, one does nothing."""

from typing import Any

import torch
import triton
import triton.language as tl

from halimede.kernels.launch import Variant, launch
from halimede.kernels.tuning import KernelConfig

_PROGRAMS_A_PROCESSOR = 16


@triton.jit(do_not_specialize=["num_tiles"])  # type: ignore[untyped-decorator]
def _read_kernel(x_ptr, sums_ptr, num_tiles, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.int32)
    for tile in range(num_tiles):
        sums += tl.load(x_ptr + (tile * tl.num_programs(0) + program) * BLOCK + offsets)
    tl.store(sums_ptr + program, tl.sum(sums, axis=0))


@triton.jit(do_not_specialize=["n0", "n1", "n2", "n3"])  # type: ignore[untyped-decorator]
def _empty_kernel(p0, p1, p2, p3, n0, n1, n2, n3, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    # Nothing that the GPU does, but arguments that the host must pass: as many as a norm has.
    if n0 < 0:
        at = tl.arange(0, BLOCK)
        total = tl.load(p0 + at) + tl.load(p1 + at) + tl.load(p2 + at) + n1 + n2 + n3
        tl.store(p3 + at, total)


class Reader:
    """Reads a tensor of int32 from end to end."""

    def __init__(self, x: torch.Tensor, processors: int, block: int) -> None:
        self._x = x
        self._grid = (processors * _PROGRAMS_A_PROCESSOR,)
        self._num_tiles = x.numel() // (self._grid[0] * block)
        self._config = KernelConfig({"BLOCK": block}, num_warps=8, num_stages=3)
        self.sums = torch.zeros(self._grid, dtype=torch.int32, device=x.device)
        self.num_bytes = 4 * self._num_tiles * self._grid[0] * block

    def __call__(self) -> None:
        launch(_read_kernel, self._grid, self._x, self.sums, self._num_tiles, config=self._config)


class Empty:
    """The kernel that does nothing, in the ways there are to start it."""

    def __init__(self, device: torch.device) -> None:
        self._arguments = (
            *(torch.zeros(128, dtype=torch.int32, device=device) for _ in range(4)),
            3,
            5,
            7,
            9,
        )
        self._config = KernelConfig({"BLOCK": 128}, num_warps=4, num_stages=1)
        self._variant = Variant(_empty_kernel, self._config)

    def by_variant(self) -> None:
        """As a model's layers start their kernels."""
        self._variant.start((1,), *self._arguments)

    def by_launch(self) -> None:
        launch(_empty_kernel, (1,), *self._arguments, config=self._config)

    def by_triton(self) -> Any:
        return _empty_kernel[(1,)](*self._arguments, BLOCK=128, num_warps=4)
