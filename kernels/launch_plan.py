"""One kernel, ready to be launched again and again with other arguments: 1.3 µs a launch in plain Python.

What a launch costs the CPU is what a small model's step costs, where no CUDA graph hides it. So all that does
not change is made once: the arguments' memory with the array of pointers to them, the format that packs them
in one call, and ctypes parameters for what is always the same (benchmarks/launch.py has the numbers).
"""

import ctypes
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from ctypes import byref, c_uint64, c_void_p
from functools import partial
from typing import Any

import torch

from halimede.errors import KernelError
from halimede.kernels.gpu_driver import GpuDriver, current_stream

Grid = tuple[int, ...]
Values = Sequence[int | float]
Launch = Callable[[Grid, int, Values], None]
"""Takes the grid, the stream's handle and one value for each argument."""
Allocate = Callable[[int], torch.Tensor]
"""Gives at least so many bytes of the device that the launch is on, for its stream."""

# Codes of the struct module in its native mode, which aligns as a GPU does: each number to its own size.
_CODES: Mapping[str, str] = {
    "i1": "?",
    "u1": "?",
    "i8": "b",
    "u8": "B",
    "i16": "h",
    "u16": "H",
    "i32": "i",
    "u32": "I",
    "i64": "q",
    "u64": "Q",
    "fp32": "f",
    "fp64": "d",
}
_POINTER = "P"  # faster than Q
# Triton appends two pointers to what a kernel takes: memory for itself (global_scratch, profile_scratch).
# They are null for a kernel that asks for none; the first is packed as an argument for one that does.
_NUM_SCRATCH_POINTERS = 2
_LARGEST_SIZE = (1 << 31) - 1
_PACKING_ERRORS = (struct.error, TypeError, OverflowError)
# Without torch.cuda's look at whether it has been initialised: 0.06 µs.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def device_memory(num_bytes: int) -> torch.Tensor:
    """Bytes on torch's current device, for work in its current stream there."""
    return torch.empty(num_bytes, dtype=torch.uint8, device="cuda")


class _Pointers(dict[int, Any]):
    """The ctypes parameter for each stream's handle. A process has few streams."""

    def __missing__(self, address: int) -> Any:
        self[address] = c_void_p.from_param(address)
        return self[address]


_streams = _Pointers()


class LaunchPlan:
    """A loaded kernel and how it takes its arguments.

    launch: starts the kernel, as calling the plan does, 0.2 µs faster.
    """

    __slots__ = ("launch", "name")
    launch: Launch

    def __init__(
        self,
        driver: GpuDriver,
        function: int,
        *,
        name: str,
        types: Sequence[str],
        threads: int,
        shared_memory: int,
        scratch_bytes: int = 0,
        scratch_align: int = 1,
        allocate: Allocate = device_memory,
    ) -> None:
        """function: the handle that driver.load gave. name: for messages.

        types: Triton's names of the runtime arguments' types, in order, without constexprs. threads: of each
        block (Triton's num_warps times the target's warp_size). shared_memory: bytes of each block, as given
        to driver.load. scratch_bytes, scratch_align: of global memory for each block; `allocate` gives it for
        a launch, all blocks' together.
        The kernel must want no cluster of blocks, no cooperative launch and no memory for a profile.
        KernelError for a type that has no plain value: 16-bit floats, descriptors, tuples.
        """
        self.name = name
        codes = [_code(name, index, kind) for index, kind in enumerate(types)]
        packing = partial(_packing_error, name, list(types), codes)
        if not scratch_bytes:
            new_slot = partial(_new_slot, codes, _NUM_SCRATCH_POINTERS)
            self.launch = _launcher(driver, function, name, threads, shared_memory, new_slot, packing)
            return
        new_slot = partial(_new_slot, [*codes, _POINTER], _NUM_SCRATCH_POINTERS - 1)
        own_packing = partial(_packing_error_with_scratch, packing)
        launch = _launcher(driver, function, name, threads, shared_memory, new_slot, own_packing)
        self.launch = _with_scratch(launch, scratch_bytes, scratch_align, allocate)

    def __call__(self, grid: Grid, stream: int, values: Values) -> None:
        """Start the kernel over `grid`, one to three sizes; a size of 0 starts nothing.

        stream: its handle, 0 for the default one; of the current device, as the kernel is. values: one for
        each type: pointers as integers (0 for none), numbers, bools. Any thread may call, also at the same
        time. KernelError if a value does not fit its type or the driver refuses.
        """
        self.launch(grid, stream, values)


_Slot = tuple[Callable[..., None], Any]


def _with_scratch(launch: Launch, size: int, align: int, allocate: Allocate) -> Launch:
    """`launch`, whose values have a pointer more: to `size` bytes for each block of the grid."""

    def launch_with_scratch(grid: Grid, stream: int, values: Values) -> None:
        num_blocks = math.prod(grid)
        if num_blocks <= 0:  # starts nothing, or is refused
            launch(grid, stream, (*values, 0))
            return
        # Freed as soon as the kernel is in the stream: what gets the memory next runs after it there. While
        # a CUDA graph is captured it comes from the graph's own pool, which lives as long as the graph.
        memory = allocate(num_blocks * size + align - 1)
        launch(grid, stream, (*values, -(-memory.data_ptr() // align) * align))

    return launch_with_scratch


def _launcher(
    driver: GpuDriver,
    function: int,
    name: str,
    threads: int,
    shared_memory: int,
    new_slot: Callable[[], _Slot],
    packing_error: Callable[[Values, Exception], KernelError],
) -> Launch:
    """The function that launches; a closure, whose variables Python reaches faster than attributes."""
    start, streams = driver.launch_function, _streams
    handle = c_void_p.from_param(function)
    # Python's lock is free during a launch, so another thread may pack its arguments then: each takes a slot
    # that nobody has (list.pop and append cannot be interrupted; 0.03 µs against a lock's 0.2).
    slots = [new_slot()]
    take, give = slots.pop, slots.append

    def launch(grid: Grid, stream: int, values: Values) -> None:
        try:
            x, y, z = grid
        except ValueError:
            x, y, z = _three_sizes(name, grid)
        if not (0 < x <= _LARGEST_SIZE and 0 < y <= _LARGEST_SIZE and 0 < z <= _LARGEST_SIZE):
            _require_empty(name, grid)
            return
        try:
            slot = take()
        except IndexError:
            slot = new_slot()
        pack, parameters = slot
        try:
            pack(*values)
        except _PACKING_ERRORS as error:
            raise packing_error(values, error) from error
        code = start(handle, x, y, z, threads, 1, 1, shared_memory, streams[stream], parameters, None)
        if code:
            if driver.prepare_thread(function):
                code = start(handle, x, y, z, threads, 1, 1, shared_memory, streams[stream], parameters, None)
            driver.check(
                code,
                f"launching kernel {name} over {grid} blocks of {threads} threads with {shared_memory} bytes "
                "of shared memory",
            )
        give(slot)

    return launch


def _new_slot(codes: Sequence[str], num_nulls: int) -> _Slot:
    """Memory for one launch's arguments: what packs values into it, and the array of pointers to them.

    num_nulls: scratch pointers after them that stay null.
    """
    with_scratch = [*codes, *[_POINTER] * num_nulls]
    ends = [struct.calcsize("@" + "".join(with_scratch[: i + 1])) for i in range(len(with_scratch))]
    memory = (c_uint64 * -(-ends[-1] // 8))()  # zeros, so pointers are null
    start = ctypes.addressof(memory)
    sizes = [struct.calcsize("@" + code) for code in with_scratch]
    addresses = [start + end - size for end, size in zip(ends, sizes, strict=True)]
    # The array does not hold the memory; what packs does, and a slot has both.
    pack = partial(struct.Struct("@" + "".join(codes)).pack_into, memory, 0)
    return pack, byref((c_void_p * len(addresses))(*addresses))


def _code(name: str, index: int, kind: str) -> str:
    if str(kind).startswith("*"):  # a tuple has a tuple of types
        return _POINTER
    if kind not in _CODES:
        raise KernelError(
            f"argument {index} of kernel {name} is a {kind}, which cannot be passed; make it a pointer, or "
            f"one of: {', '.join(_CODES)}"
        )
    return _CODES[kind]


def _packing_error(
    name: str, types: Sequence[str], codes: Sequence[str], values: Values, error: Exception
) -> KernelError:
    """What is wrong with the values, which could not be packed."""
    if len(values) != len(types):
        return KernelError(
            f"kernel {name} takes {len(types)} arguments ({', '.join(types)}), not {len(values)}"
        )
    for index, (kind, code, value) in enumerate(zip(types, codes, values, strict=True)):
        try:
            struct.pack("@" + code, value)
        except _PACKING_ERRORS:
            return KernelError(
                f"argument {index} of kernel {name} cannot be {value!r}: it is a {kind}; give a number "
                "that fits, for a tensor its data_ptr()"
            )
    return KernelError(f"the arguments of kernel {name} cannot be packed: {error}")


def _packing_error_with_scratch(
    packing_error: Callable[[Values, Exception], KernelError], values: Values, error: Exception
) -> KernelError:
    """Says nothing of the pointer at the end, which the caller did not give."""
    return packing_error(values[:-1], error)


def _three_sizes(name: str, grid: Grid) -> tuple[int, int, int]:
    if not 1 <= len(grid) <= 3:
        raise KernelError(f"kernel {name} was given the grid {grid}; it must have one to three sizes")
    x, y, z = (*grid, 1, 1)[:3]
    return x, y, z


def _require_empty(name: str, grid: Grid) -> None:
    if 0 not in grid:
        raise KernelError(
            f"kernel {name} was given the grid {grid}; each size must be from 0 to {_LARGEST_SIZE}"
        )


def launch_on(device: int, launch: Launch, grid: Grid, values: Values) -> None:
    """Start a kernel (a plan's `launch`) on the GPU that it was loaded on, in torch's current stream there.

    A driver launches on the thread's current device only, so another one is made current for the launch.
    KernelError as LaunchPlan and current_stream.
    """
    if _current_device() == device:
        launch(grid, current_stream(device), values)
        return
    with torch.cuda.device(device):
        launch(grid, current_stream(device), values)
