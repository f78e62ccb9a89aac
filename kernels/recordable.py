"""Functions of ours as operations of torch, so that a recording of a layer can call them.

torch.jit.trace records the operations that a function calls, not its loops and decisions, and cannot record
all operations (a view as another type). An operation of ours is one step of a recording, whatever it does
inside, for 9 us a call.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def recordable(function: Callable[..., torch.Tensor], signature: str) -> Callable[..., torch.Tensor]:
    """The function as an operation, for CPU tensors. signature: its arguments in torch's notation.

    Cached, because an operation can be defined once in a process, and is gone with its library.
    """
    library: Any = torch.library.Library("halimede", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(f"{function.__name__}({signature}) -> Tensor")
    library.impl(function.__name__, function, "CPU")
    operation: Callable[..., torch.Tensor] = getattr(torch.ops.halimede, function.__name__)
    return _Kept(operation, library)


class _Kept:
    """An operation together with the library that defines it."""

    def __init__(self, operation: Callable[..., torch.Tensor], library: Any) -> None:
        self._operation, self._library = operation, library

    def __call__(self, *arguments: Any) -> torch.Tensor:
        return self._operation(*arguments)
