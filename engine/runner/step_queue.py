"""How the runner hands work to its device and gets the results back, without waiting for it in between."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pending(Generic[T]):
    """A result that is made from tensors that the device is still working on.

    read: makes it from copies of the tensors on the CPU.
    """

    tensors: tuple[torch.Tensor, ...]
    read: Callable[[Sequence[torch.Tensor]], T]


Work = Callable[[], Pending[T]]
"""Something for the device to do, as calls of torch and kernels. It may be called later than it was handed
over, so it must hold all that it needs of the host, and nothing that the host goes on changing."""


class StepQueue(Protocol):
    """A device that does its work in the order in which it was handed over."""

    def submit(self, work: Work[T]) -> Callable[[], T]:
        """Hand work over. The function returned waits for it and returns its result."""
        ...

    def drain(self) -> None:
        """Wait for all work."""
        ...


class HostQueue:
    """Work is done while it is handed over: a CPU's."""

    def submit(self, work: Work[T]) -> Callable[[], T]:
        """See StepQueue.submit."""
        pending = work()
        return lambda: pending.read(pending.tensors)

    def drain(self) -> None:
        """There is nothing to wait for."""


class CudaQueue:
    """The current stream of a GPU, which need not be the current device.

    Results come back by copies into pinned memory, with an event behind.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def submit(self, work: Work[T]) -> Callable[[], T]:
        """See StepQueue.submit."""
        pending = work()
        if not pending.tensors:
            return lambda: pending.read(())
        copies = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            for tensor in pending.tensors
        ]
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))

        def wait() -> T:
            event.synchronize()
            return pending.read(copies)

        return wait

    def drain(self) -> None:
        """See StepQueue.drain."""
        torch.cuda.synchronize(self._device)


def make_queue(device: torch.device) -> StepQueue:
    """The queue of a device."""
    return CudaQueue(device) if device.type == "cuda" else HostQueue()
