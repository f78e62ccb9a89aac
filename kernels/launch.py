"""How a kernel's launcher starts its kernel: on a GPU it runs, on CPU tensors it is interpreted, and inside
of `intercepting` it is handed to somebody who wants to know, whatever its tensors are.

So what is tested without a GPU, what is built ahead and what serves are the same call with the same choices.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from halimede.errors import KernelError
from halimede.kernels.device_kernels import device_kernels
from halimede.kernels.library import current_library
from halimede.kernels.specialise import Specialisation, specialise
from halimede.kernels.target import TARGETS, Target, target_of_device
from halimede.kernels.tuning import KernelConfig

INTERPRETED_TARGET = TARGETS["sm_90"]
"""Whose choices the interpreter follows."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What `launch` was asked for. constants: all constexprs, also those of the config."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    config: KernelConfig
    constants: Mapping[str, Any]

    def specialise(self, target: Target) -> Specialisation:
        """What it is compiled for."""
        return specialise(self.kernel, self.args, self.constants, self.config, target)


Interceptor = Callable[[Launch], None]


@dataclass(frozen=True, slots=True)
class _Interception:
    target: Target
    interceptor: Interceptor


_interception: ContextVar[_Interception | None] = ContextVar("halimede_launches", default=None)


@contextlib.contextmanager
def intercepting(target: Target, interceptor: Interceptor) -> Iterator[None]:
    """Launches inside make the choices of `target` and are given to `interceptor` in place of being run."""
    token = _interception.set(_Interception(target, interceptor))
    try:
        yield
    finally:
        _interception.reset(token)


def target_of(tensor: torch.Tensor) -> Target:
    """The target whose choices a launch on this tensor's device follows."""
    interception = _interception.get()
    if interception is not None:
        return interception.target
    return target_of_device(tensor.device) if tensor.device.type == "cuda" else INTERPRETED_TARGET


class Variant:
    """A kernel with its config and all its constexprs, for arguments of the same types at every launch.

    Launchers that run in every layer make one for what they have checked (dtypes, sizes, strides) and keep
    it: `start` then finds the loaded kernel by the variant itself, and looks at nothing of the arguments but
    their addresses.
    """

    __slots__ = ("config", "constants", "kernel")

    def __init__(self, kernel: Any, config: KernelConfig, **constants: Any) -> None:
        self.kernel = kernel
        self.config = config
        self.constants: Mapping[str, Any] = {**constants, **config.blocks}

    def start(self, grid: tuple[int, ...], *args: Any) -> None:
        """As `launch`. args: of the same types as ever, None where they were None, numbers within 32 bits."""
        interception = _interception.get()
        if interception is None and args[0].is_cuda:
            device_kernels(current_library(), args[0].device).start(self, grid, args)
        else:
            _launch(interception, self.kernel, grid, args, self.config, self.constants)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, config: KernelConfig, **constants: Any) -> None:
    """Start `kernel` (a @triton.jit function) over `grid`, one to three sizes.

    args: in the kernel's order, up to its first constexpr; the first is a tensor and says the device.
    constants: its constexprs but for those that `config.blocks` holds, always in the same order. A grid with
    a size of 0 starts nothing.
    """
    constants |= config.blocks
    _launch(_interception.get(), kernel, grid, args, config, constants)


def _launch(
    interception: _Interception | None,
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    config: KernelConfig,
    constants: Mapping[str, Any],
) -> None:
    if interception is not None:
        interception.interceptor(Launch(kernel, grid, args, config, constants))
        return
    if 0 in grid:
        return
    device = args[0].device
    if device.type == "cuda":
        device_kernels(current_library(), device).launch(kernel, grid, args, config, constants)
        return
    if device.type != "cpu":
        raise KernelError(f"{kernel.__name__} was given tensors on {device}, where no kernel runs")
    from halimede.kernels.interpret import interpret

    interpret(kernel, grid, args, dict(constants))
