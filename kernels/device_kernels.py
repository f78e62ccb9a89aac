"""The kernels that are loaded on one GPU, and how they are launched there.

The first launch of a kind finds out what it is specialised for and loads it; later ones find a plan by the
types of their arguments and start it, without Triton: no driver of its own, no C compiler, no hashing.
"""

import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from halimede.kernels.gpu_driver import GpuDriver, driver_for
from halimede.kernels.launch_plan import Allocate, Grid, LaunchPlan, Values, device_memory, launch_on
from halimede.kernels.launch_plan import Launch as StartPlan
from halimede.kernels.library import KernelLibrary
from halimede.kernels.specialise import Specialisation, specialise
from halimede.kernels.store import KernelEntry
from halimede.kernels.target import Target, target_of_device
from halimede.kernels.tuning import KernelConfig

if TYPE_CHECKING:
    from halimede.kernels.launch import Variant

_UNALIGNED = 15  # bits of an address that is no multiple of 16
# Triton for AMD makes other code for a tensor whose storage is larger: offsets no longer fit 32 bits.
_SHORT_STORAGE = (1 << 31) - 1
_INT32 = 1 << 31


class DeviceKernels:
    """Of one library on one device.

    index: the device's number. start: starts a plan's launch on the device's current stream. allocate: gives
    memory of the device to a launch whose kernel asks for some, inside of `start`.
    """

    def __init__(
        self,
        library: KernelLibrary,
        target: Target,
        driver: GpuDriver,
        *,
        index: int,
        start: Callable[[int, StartPlan, Grid, Values], None] = launch_on,
        allocate: Allocate = device_memory,
    ) -> None:
        self._library = library
        self._target = target
        self._driver = driver
        self._index = index
        self._start = start
        self._allocate = allocate
        self._plans: dict[Hashable, StartPlan] = {}
        self._loaded: dict[str, LaunchPlan] = {}
        self._lock = threading.Lock()
        self._sizes_matter = target.backend == "hip"

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        args: tuple[Any, ...],
        config: KernelConfig,
        constants: Mapping[str, Any],
    ) -> None:
        """Start a kernel on the device's current stream; see launch.launch. KernelError if that fails."""
        key = (
            id(kernel),  # its own hash is slow; kernels are never freed
            config.num_warps,
            config.num_stages,
            *config.options.items(),
            *constants.values(),
            *[arg.dtype if isinstance(arg, torch.Tensor) else _kind(arg) for arg in args],
        )
        self._start_known(key, kernel, grid, args, config, constants)

    def start(self, variant: "Variant", grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """Start a variant; see Variant.start."""
        self._start_known(variant, variant.kernel, grid, args, variant.config, variant.constants)

    def _start_known(
        self,
        key: Hashable,
        kernel: Any,
        grid: tuple[int, ...],
        args: tuple[Any, ...],
        config: KernelConfig,
        constants: Mapping[str, Any],
    ) -> None:
        """key: of all that tells one specialisation from another, but for addresses and sizes in memory."""
        values: list[Any] = []
        bits = 0
        for arg in args:
            if isinstance(arg, torch.Tensor):
                address = arg.data_ptr()
                bits |= address
                values.append(address)
            elif arg is not None:
                values.append(arg)
        if bits & _UNALIGNED or self._sizes_matter:
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            aligned = [arg.data_ptr() & _UNALIGNED == 0 for arg in tensors]
            key = (key, *aligned, *([_is_short(arg) for arg in tensors] if self._sizes_matter else ()))
        start = self._plans.get(key)
        if start is None:
            plan = self._resolve(specialise(kernel, args, constants, config, self._target), len(values))
            start = self._plans[key] = plan.launch
        # A plan takes other numbers of sizes too, but more slowly.
        self._start(self._index, start, grid if len(grid) == 3 else (*grid, 1, 1)[:3], values)

    def preload(self, specialisations: Iterable[Specialisation]) -> list[Specialisation]:
        """Load those that the cache has; returns the others. Compiles nothing."""
        missing = []
        for specialisation in specialisations:
            found = self._library.find_cached(specialisation)
            if found is None:
                missing.append(specialisation)
            else:
                self._load(specialisation, *found)
        return missing

    def _resolve(self, specialisation: Specialisation, num_values: int) -> LaunchPlan:
        assert len(specialisation.types) == num_values, (
            f"{specialisation.name} has a number that Triton specialises on: use do_not_specialize"
        )
        with self._lock:
            loaded = self._loaded.get(specialisation.key)
        return loaded or self._load(specialisation, *self._library.find(specialisation))

    def _load(self, specialisation: Specialisation, entry: KernelEntry, binary: bytes) -> LaunchPlan:
        function = self._driver.load(binary, entry.entry_point, entry.shared_memory, self._index)
        plan = LaunchPlan(
            self._driver,
            function,
            types=specialisation.types,
            threads=entry.threads,
            shared_memory=entry.shared_memory,
            name=entry.entry_point,
            scratch_bytes=entry.scratch_bytes,
            scratch_align=entry.scratch_align,
            allocate=self._allocate,
        )
        with self._lock:
            return self._loaded.setdefault(specialisation.key, plan)


def device_kernels(library: KernelLibrary, device: torch.device) -> DeviceKernels:
    """The library's kernels on a GPU that is there, made at the first call."""
    index = torch.cuda.current_device() if device.index is None else device.index
    found = library.devices.get(index)
    if found is None:
        target = target_of_device(torch.device("cuda", index))
        made = DeviceKernels(library, target, driver_for(target.backend), index=index)
        found = library.devices.setdefault(index, made)
    assert isinstance(found, DeviceKernels)
    return found


def _kind(arg: Any) -> Any:
    """What of a number or None changes its type at a launch."""
    return -_INT32 <= arg < _INT32 if type(arg) is int else type(arg)


def _is_short(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() <= _SHORT_STORAGE
