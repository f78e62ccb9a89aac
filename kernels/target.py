"""The GPUs that kernels are built for: what a kernel's choices may hang on, without the GPU at hand.

Shared memory: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; for AMD the LDS
of a compute unit, from the CDNA and RDNA instruction set documents.
"""

import re
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import torch

from halimede.errors import KernelError

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

Backend = Literal["cuda", "hip"]


@dataclass(frozen=True, slots=True, eq=False)  # by identity: it is a key at every launch
class Target:
    """One GPU architecture.

    arch: as Triton names it, 90 or "gfx942". warp_size: threads. shared_memory: bytes that one program may
    use. native_e4m3: whether it converts float8_e4m3fn itself. wgmma: whether products of 64 rows and more
    run on Hopper's warp-group instructions. machine: what code is made for, "sm_103", if that is another one
    whose kernels make this one's choices.
    """

    name: str
    backend: Backend
    arch: int | str
    warp_size: int
    shared_memory: int
    native_e4m3: bool
    wgmma: bool = False
    machine: str = ""

    def __post_init__(self) -> None:
        if not self.machine:
            object.__setattr__(self, "machine", self.name)

    def for_triton(self) -> "GPUTarget":
        """The machine as Triton's compiler takes it."""
        from triton.backends.compiler import GPUTarget

        arch = int(self.machine.removeprefix("sm_")) if self.backend == "cuda" else self.machine
        return GPUTarget(self.backend, arch, self.warp_size)


def _cuda(arch: int, shared_kib: int, *, native_e4m3: bool, wgmma: bool = False) -> Target:
    return Target(f"sm_{arch}", "cuda", arch, 32, shared_kib << 10, native_e4m3, wgmma)


def _hip(arch: str, warp_size: int, shared_kib: int, *, native_e4m3: bool) -> Target:
    return Target(arch, "hip", arch, warp_size, shared_kib << 10, native_e4m3)


TARGETS = MappingProxyType(
    {
        target.name: target
        for target in (
            _cuda(80, 163, native_e4m3=False),
            _cuda(86, 99, native_e4m3=False),
            _cuda(89, 99, native_e4m3=True),
            _cuda(90, 227, native_e4m3=True, wgmma=True),
            _cuda(100, 227, native_e4m3=True),
            _cuda(120, 99, native_e4m3=True),
            _hip("gfx90a", 64, 64, native_e4m3=False),
            _hip("gfx942", 64, 64, native_e4m3=False),  # its own 8-bit type has another bias
            _hip("gfx950", 64, 160, native_e4m3=True),
            _hip("gfx1100", 32, 64, native_e4m3=False),
            # It has instructions for the type, but Triton emulates them, in twice the code of ours.
            _hip("gfx1201", 32, 64, native_e4m3=False),
        )
    }
)
"""Every target, in the order of the tables that people read."""

_CUDA_ARCHS = (80, 86, 89, 90, 100, 120)
# AMD GPUs that run another one's choices; their code is still compiled for themselves.
_HIP_KIN = MappingProxyType(
    {
        "gfx940": "gfx942",
        "gfx941": "gfx942",
        "gfx1101": "gfx1100",
        "gfx1102": "gfx1100",
        "gfx1103": "gfx1100",
        "gfx1150": "gfx1100",
        "gfx1151": "gfx1100",
        "gfx1200": "gfx1201",
    }
)


def find_target(name: str) -> Target:
    """The target of that name, as own_target has it; KernelError if there are no kernels for it."""
    if name.startswith("gfx"):
        return own_target("hip", name)
    number = re.fullmatch(r"sm_?(\d+)a?", name)
    if number is None:
        raise KernelError(f"target {name!r} is unknown; use one of: {', '.join(TARGETS)}")
    return own_target("cuda", int(number[1]))


def nearest_target(backend: str, arch: int | str) -> Target:
    """The target whose choices suit a GPU: itself, or the newest of its line that is not newer.

    KernelError for a GPU that is older than every target, or of an unknown line.
    """
    if backend == "hip":
        name = _HIP_KIN.get(str(arch), str(arch))
        if name in TARGETS:
            return TARGETS[name]
    elif backend == "cuda":
        older = [known for known in _CUDA_ARCHS if known <= int(arch)]
        if older:
            return TARGETS[f"sm_{older[-1]}"]
    raise KernelError(f"no kernels for {backend} GPUs of type {arch}; they exist for: {', '.join(TARGETS)}")


@cache
def own_target(backend: str, arch: int | str) -> Target:
    """nearest_target with code for the GPU itself. KernelError as there."""
    nearest = nearest_target(backend, arch)
    machine = str(arch) if backend == "hip" else f"sm_{arch}"
    return nearest if machine == nearest.machine else replace(nearest, machine=machine)


@cache
def target_of_device(device: torch.device) -> Target:
    """The target of a GPU that is there."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return own_target("hip", properties.gcnArchName.split(":")[0])
    return own_target("cuda", properties.major * 10 + properties.minor)


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of the device; for a device that is not a GPU, 4."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
