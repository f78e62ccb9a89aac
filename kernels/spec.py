"""What a kernel declares about itself. ALL_KERNELS feeds tests, compile, inspection, benchmarks and docs."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from halimede.kernels.launch import Launch
    from halimede.kernels.target import Target
    from halimede.kernels.tuning import KernelConfig

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """What one call cannot do without: bytes read and written, floating point operations."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True, slots=True)
class Case:
    """One way to call a kernel.

    make: the keyword arguments of launcher and reference, tensors on the given device: "cpu" and "cuda" give
    random contents from torch's global generator, "meta" only shapes. work: of this call.
    """

    name: str
    make: Callable[[torch.device], dict[str, Any]]
    work: Work | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """An edit of the kernel's source, `old` to `new`, that the parity cases must notice."""

    old: str
    new: str


@dataclass(frozen=True, slots=True)
class TuningSpace:
    """Where `halimede tune` looks for a better config than the launcher's own.

    kernel: the function whose launches are tuned; the launcher asks pick_config for its config under the
    spec's name. configs: what to try for a launch (its constants say the shape, `config` what the launcher
    chose); one that the launcher refuses, or that does not compile, spills or needs too much shared memory
    is left out later. case: a call of the launcher with the shapes of a launch, whose tensors may be on
    "meta"; it can be repeated, as it changes nothing but its outputs. error: the largest difference from the
    reference of an output, as a part of that output's largest value; what is no floats must be equal.
    """

    kernel: Any
    configs: "Callable[[Target, Launch], list[KernelConfig]]"
    case: "Callable[[Launch], Case]"
    error: float


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """A kernel as everything else sees it.

    launcher, reference: take the same keyword arguments and return the same tuple of tensors: outputs, and
    arguments that they change. tolerance: the key of the table of tolerances in tests/tolerances.py.
    cases: small and odd, for parity with the reference; each runs in the interpreter within about a second.
    signatures: shapes that serving has, on meta tensors for compiling and on a GPU for timing.
    faults: see Fault; at least one. matrix_product: whether it multiplies matrices of 64 rows and more, so
    that its code must hold the target's matrix instructions. space: None for a kernel that is not tuned.
    """

    name: str
    summary: str
    launcher: Callable[..., Tensors]
    reference: Callable[..., Tensors]
    tolerance: str
    cases: tuple[Case, ...]
    signatures: tuple[Case, ...]
    faults: tuple[Fault, ...]
    matrix_product: bool = False
    space: TuningSpace | None = None


@cache
def all_kernels() -> Mapping[str, KernelSpec]:
    """Every spec by name, sorted: those in the SPECS of the modules of halimede.kernels.gpu."""
    from halimede.kernels import gpu

    names = sorted(module.name for module in pkgutil.iter_modules(gpu.__path__))
    modules = [importlib.import_module(f"{gpu.__name__}.{name}") for name in names]
    specs = [spec for module in modules for spec in getattr(module, "SPECS", ())]
    assert len({spec.name for spec in specs}) == len(specs), "two kernels have one name"
    return {spec.name: spec for spec in sorted(specs, key=lambda spec: spec.name)}
