"""Compiles kernels for a GPU that is not there: Triton is told of one, and launchers run on meta tensors.

Triton's compiler and the ptxas in its wheel need neither GPU nor toolkit. Launching on meta tensors gives
exactly the specialisation (types, alignment, constants) that the same call has on the GPU, so the result
has the same key in Triton's cache.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from halimede.errors import KernelError
from halimede.kernels.launch import Build, collecting
from halimede.kernels.spec import Case, KernelSpec
from halimede.kernels.target import TARGETS, Target

_META = torch.device("meta")


class _NoLauncher:
    def __init__(self, *args: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        raise KernelError("a kernel compiled for a GPU that is not there cannot be launched")


class _PretendedDriver(DriverBase):  # type: ignore[misc]
    """What Triton asks its driver while compiling, for a given target. It cannot launch."""

    launcher_cls = _NoLauncher

    def __init__(self, target: Target) -> None:
        self._target = target
        # JITFunction keeps kernels by device number: one for each target.
        self._device = 1000 + list(TARGETS).index(target.name)

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


@contextlib.contextmanager
def _pretending(target: Target) -> Iterator[None]:
    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_PretendedDriver(target))
    try:
        yield
    finally:
        driver._active = before


def compile_case(spec: KernelSpec, case: Case, target: Target) -> list[Build]:
    """Every kernel that spec's launcher starts for the case, compiled for the target.

    KernelError that names kernel, case and target, with the compiler's message, if it cannot be compiled.
    """
    with _pretending(target), collecting(target) as collection, torch.device("meta"):
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
