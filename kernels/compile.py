"""Compiles kernels for a GPU that is not there: Triton is told of one, and launchers run on meta tensors.

Triton's compiler and the ptxas in its wheel need neither GPU nor toolkit. Launching on meta tensors gives
exactly the specialisation (types, alignment, constants) that the same call has on the GPU, so the result
has the same key in Triton's cache.
"""

import contextlib
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from halimede.errors import KernelError
from halimede.kernels.kernel_source import kernel_source
from halimede.kernels.launch import Build, collecting
from halimede.kernels.spec import Case, KernelSpec
from halimede.kernels.target import TARGETS, Target
from halimede.kernels.tuning import KernelConfig

_META = torch.device("meta")


class _NoLauncher:
    def __init__(self, *args: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        raise KernelError("a kernel compiled for a GPU that is not there cannot be launched")


class _PretendedDriver(DriverBase):  # type: ignore[misc]
    """What Triton asks its driver while compiling, for a given target. It cannot launch."""

    launcher_cls = _NoLauncher

    def __init__(self, target: Target, first_device: int) -> None:
        self._target = target
        # JITFunction keeps kernels by device number: one for each target.
        self._device = first_device + list(TARGETS).index(target.name)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self._target.for_triton()

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return _META

    def get_benchmarker(self) -> Any:
        raise KernelError("nothing can be timed on a GPU that is not there")


# Planning has devices of its own: what was compiled is not seen there as present.
_COMPILING, _PLANNING = 1000, 2000


@contextlib.contextmanager
def _pretending(target: Target, first_device: int) -> Iterator[None]:
    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_PretendedDriver(target, first_device))
    try:
        yield
    finally:
        driver._active = before


@dataclass(frozen=True, slots=True)
class Plan:
    """A specialisation that has not been compiled.

    digest: of all that its machine code hangs on besides Triton's version: the source with its helpers,
    types, alignment, constants, options, target. Comments and the place in the file are not in it.
    """

    name: str
    config: KernelConfig
    digest: str


def compile_case(spec: KernelSpec, case: Case, target: Target) -> list[Build]:
    """Every kernel that spec's launcher starts for the case, compiled for the target.

    KernelError that names kernel, case and target, with the compiler's message, if it cannot be compiled.
    """
    with _pretending(target, _COMPILING):
        return _launch_on_meta(spec, case, target)


def plan_case(spec: KernelSpec, case: Case, target: Target) -> list[Plan]:
    """What compile_case would compile, in the same order, in milliseconds. KernelError as there."""
    digests: list[str] = []

    def note_and_skip(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        text = f"{target.name}\n{compile['key']}\n{kernel_source(fn.jit_function)}"
        digests.append(hashlib.sha256(text.encode()).hexdigest()[:12])
        return True

    with _pretending(target, _PLANNING), triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = note_and_skip
        builds = _launch_on_meta(spec, case, target)
    return [Plan(b.name, b.config, digest) for b, digest in zip(builds, digests, strict=True)]


def _launch_on_meta(spec: KernelSpec, case: Case, target: Target) -> list[Build]:
    with collecting(target) as collection, torch.device("meta"):
        try:
            # ptxas prints the whole program on an error.
            with contextlib.redirect_stdout(io.StringIO()):
                spec.launcher(**case.make(_META))
        except KernelError:
            raise
        except Exception as error:
            raise KernelError(
                f"{spec.name} ({case.name}) cannot be compiled for {target.name} by Triton "
                f"{triton.__version__}: {type(error).__name__}: {error}"
            ) from error
    return collection.builds
