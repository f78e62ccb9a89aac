"""What kernels over the rows of a matrix share: strides that the compiler can align, warps for a row."""

import torch

from halimede.kernels.target import Target

MAX_WARPS = 16
"""1024 threads, the most of a program, where a warp has 64."""


def aligned_strides(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> tuple[int, list[int]]:
    """(unit, the strides of the dimensions in `shape` in units).

    A stride that varies is no constant of the kernel, so the compiler could not know that rows begin at
    multiples of 16 bytes and would load element by element. As a number of units, multiplied by a constant
    unit, it can: unit is 16 bytes of elements, or 1 if a stride is not a multiple of that.
    """
    # The stride of a dimension of size 1 says nothing, and torch may give any.
    used = [stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=False)]
    unit = 16 // dtype.itemsize
    for stride in used:
        if stride % unit:
            return 1, used
    return unit, [stride // unit for stride in used]


def row_warps(num_elements: int, target: Target) -> int:
    """Warps for a tile of so many elements, 16 a thread: two loads of 16 bytes where they have 16 bits."""
    return min(MAX_WARPS, max(1, num_elements // (16 * target.warp_size)))
