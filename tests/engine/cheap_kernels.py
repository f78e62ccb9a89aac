"""Kernels that compile in a tenth of a second, for tests of warm-up."""

from typing import Any

import torch
import triton
import triton.language as tl

from halimede.kernels.specialise import Specialisation, specialise
from halimede.kernels.target import find_target
from halimede.kernels.tuning import KernelConfig


@triton.jit
def _scale_kernel(
    x_ptr,
    y_ptr,
    bias_ptr,
    size,
    SCALE: tl.constexpr,
    MODE: tl.constexpr,
    TWICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32) * SCALE
    if bias_ptr is not None:
        x += tl.load(bias_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    if MODE == "negative":
        x = -x
    if TWICE:
        x += x
    tl.store(y_ptr + at, x.to(y_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def _refused_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 7, "there are seven of them")
    tl.store(x_ptr + tl.arange(0, BLOCK), 0.0)


def cheap(
    target: str = "sm_90",
    *,
    scale: float = 1.5,
    mode: str | None = None,
    twice: bool | None = False,
    bias: bool = False,
) -> Specialisation:
    x = torch.empty(64, dtype=torch.float16, device="meta")
    constants = {"SCALE": scale, "MODE": mode, "TWICE": twice}
    return _one(_scale_kernel, (x, x, x if bias else None, 40), constants, target)


def four() -> list[Specialisation]:
    """With constants of every kind: None, floats, integers, strings, booleans."""
    return [
        cheap(),
        cheap(scale=1e-05, mode="negative"),
        cheap(scale=-2, twice=None, bias=True),
        cheap("gfx942", mode="positive", twice=True),
    ]


def refused() -> Specialisation:
    """Triton does not compile it."""
    return _one(_refused_kernel, (torch.empty(8, device="meta"),), {}, "sm_90")


def deadly() -> Specialisation:
    """A process that is to compile it dies."""
    import deadly_kernel

    return _one(deadly_kernel.deadly_kernel, (torch.empty(8, device="meta"),), {}, "sm_90")


def _one(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], target: str) -> Specialisation:
    config = KernelConfig({"BLOCK": 64}, num_warps=1, num_stages=1)
    return specialise(kernel, args, {**constants, **config.blocks}, config, find_target(target))
