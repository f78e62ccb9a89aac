"""How a kernel's launcher starts its kernel: on a GPU it runs, on CPU tensors it is interpreted, and on meta
tensors it is compiled for the target of the enclosing `collecting`.

So what is tested without a GPU, what is built ahead and what serves are the same call with the same choices.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from halimede.errors import KernelError
from halimede.kernels.target import TARGETS, Target, target_of_device
from halimede.kernels.tuning import KernelConfig

INTERPRETED_TARGET = TARGETS["sm_90"]
"""Whose choices the interpreter follows."""


@dataclass(frozen=True, slots=True)
class Build:
    """One compiled specialisation: Triton's CompiledKernel and what it was compiled with."""

    name: str
    config: KernelConfig
    compiled: Any


@dataclass(frozen=True, slots=True)
class Collection:
    """What the launches inside of one `collecting` compiled, in their order."""

    target: Target
    builds: list[Build] = field(default_factory=list)


_collection: ContextVar[Collection | None] = ContextVar("halimede_kernel_collection", default=None)


@contextlib.contextmanager
def collecting(target: Target) -> Iterator[Collection]:
    """Launches on meta tensors inside compile for `target`. Triton's driver must already pretend to be it."""
    collection = Collection(target)
    token = _collection.set(collection)
    try:
        yield collection
    finally:
        _collection.reset(token)


def target_of(tensor: torch.Tensor) -> Target:
    """The target whose choices a launch on this tensor's device follows."""
    if tensor.device.type == "cuda":
        return target_of_device(tensor.device)
    collection = _collection.get()
    return INTERPRETED_TARGET if collection is None else collection.target


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, config: KernelConfig, **constants: Any) -> None:
    """Start `kernel` (a @triton.jit function) over `grid`, one to three sizes.

    args: in the kernel's order, up to its first constexpr; the first tensor says the device. constants: its
    constexprs but for those that `config.blocks` holds. A grid with a size of 0 starts nothing.
    """
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    constants = {**constants, **config.blocks}
    if device.type == "meta":
        _compile(kernel, grid, args, config, constants)
        return
    if 0 in grid:
        return
    if device.type == "cpu":
        from halimede.kernels.interpret import interpret

        interpret(kernel, grid, args, constants)
        return
    options = config.triton_options(target_of_device(device))
    with torch.cuda.device(device):
        kernel[grid](*args, **constants, **options)


def _compile(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], config: KernelConfig, constants: dict[str, Any]
) -> None:
    collection = _collection.get()
    if collection is None:
        raise KernelError(f"{kernel.__name__} was given meta tensors outside of kernels.compile")
    options = config.triton_options(collection.target)
    compiled = kernel.warmup(*args, grid=grid, **constants, **options)
    collection.builds.append(Build(kernel.__name__, config, compiled))
