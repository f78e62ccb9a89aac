"""Holds the Triton kernels against their references in the interpreter, whole or broken on purpose."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tolerances import assert_kernel_close

from halimede.kernels.spec import Case, Fault, KernelSpec, Tensors

_numbers = count()


def check_case(spec: KernelSpec, case: Case, *, seed: int = 0, device: str = "cpu") -> None:
    """AssertionError if launcher and reference differ; memory that nobody wrote is poisoned for both."""
    torch.manual_seed(seed)
    given = case.make(torch.device("cpu"))
    expected = spec.reference(**_copy(given, "cpu"))
    with _poisoned_memory():
        actual = spec.launcher(**_copy(given, device))
    _compare(spec, actual, expected)


def _compare(spec: KernelSpec, actual: Tensors, expected: Tensors) -> None:
    assert len(actual) == len(expected), "launcher and reference return different numbers of tensors"
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        if theirs.dtype.is_floating_point:
            if theirs.dtype.itemsize == 1:
                ours, theirs = ours.float(), theirs.float()
            assert_kernel_close(ours.cpu(), theirs, spec.tolerance)
        else:
            assert torch.equal(ours.cpu(), theirs)


def _copy(given: dict[str, Any], device: str) -> dict[str, Any]:
    """The arguments with tensors of their own, strides kept."""
    return {name: _copy_value(value, device) for name, value in given.items()}


def _copy_value(value: Any, device: str) -> Any:
    if isinstance(value, torch.Tensor):
        return _copy_tensor(value, device)
    if type(value) is tuple:
        return tuple(_copy_value(part, device) for part in value)
    return value


def _copy_tensor(tensor: torch.Tensor, device: str) -> torch.Tensor:
    storage = tensor.untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8).set_(storage).clone().to(device).view(tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, or the largest integer."""
    # As torch.use_deterministic_algorithms(True), which imports torch.compile with it: 2 s of a process.
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def notices(spec: KernelSpec, fault: Fault, folder: Path) -> bool:
    """Whether a case of the spec gives a wrong result once its kernel's source has the fault."""
    source = Path(sys.modules[_module_of(spec)].__file__ or "").read_text()
    assert source.count(fault.old) >= 1, f"{spec.name}: {fault.old!r} is not in its source"
    before_specs, specs = source.split("\nSPECS = ", 1) if "\nSPECS = " in source else (source, "")
    broken = before_specs.replace(fault.old, fault.new) + ("\nSPECS = " + specs if specs else "")
    module = _load(broken, folder)
    changed = next(other for other in module.SPECS if other.name == spec.name)
    for case in changed.cases:
        try:
            check_case(changed, case)
        except AssertionError:
            return True
    return False


def _module_of(spec: KernelSpec) -> str:
    return spec.launcher.__module__


def _load(source: str, folder: Path) -> ModuleType:
    """A module of that source, in a file: Triton reads a kernel's source there."""
    name = f"broken_kernel_{next(_numbers)}"
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
