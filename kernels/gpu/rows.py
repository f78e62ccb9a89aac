"""What kernels over the rows of a matrix share: strides that the compiler can align, warps for a row."""

from collections.abc import Sequence

import torch

from halimede.errors import KernelError
from halimede.kernels.target import Target
from halimede.kernels.variant_key import Layout

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


def product_rows(name: str, x: torch.Tensor) -> tuple[int, int]:
    """(unit, stride in units) of x (M, K), which a product called `name` takes; see aligned_strides.

    KernelError for other shapes, and strides of K that are not 1.
    """
    shape, strides = x.shape, x.stride()
    if len(shape) != 2 or strides[1] != 1:
        raise KernelError(
            f"{name} takes x (M, K) with unit stride in K; it is {tuple(shape)} with strides "
            f"{strides}; call .contiguous()"
        )
    unit, (stride,) = aligned_strides(shape[:1], strides, x.dtype)
    return unit, stride


def check_bias(name: str, bias: Layout | None, shape: tuple[int, int]) -> None:
    """KernelError for a bias that is not (N), contiguous. shape: the weight's."""
    if bias is not None and (bias[1] != shape[:1] or not bias[2]):
        raise KernelError(
            f"{name} takes a contiguous bias ({shape[0]},) for a weight {shape}; it is "
            f"{'' if bias[2] else 'strided '}{tuple(bias[1])}; convert it"
        )


def row_bucket(num_rows: int, buckets: Sequence[int]) -> int:
    """The first of the ascending buckets that so many rows are not beyond, or the last."""
    return next((bucket for bucket in buckets if num_rows <= bucket), buckets[-1])
