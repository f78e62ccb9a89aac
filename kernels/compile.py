"""Compiles kernels for a GPU that need not be there: launchers run on meta tensors, and what they would have
started is compiled.

Triton's compiler and the ptxas in its wheel need neither GPU nor toolkit nor driver.
"""

import contextlib
import io
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import triton
from triton.compiler.compiler import ASTSource, make_backend

from halimede.errors import KernelError
from halimede.kernels.launch import Launch, intercepting
from halimede.kernels.spec import Case, KernelSpec
from halimede.kernels.specialise import Specialisation
from halimede.kernels.target import Target
from halimede.kernels.tuning import KernelConfig

_META = torch.device("meta")
_DIGEST = 12
_Result = TypeVar("_Result")
# Triton's settings and standard output, which are changed while compiling, belong to the whole process.
_compiling = threading.Lock()


@dataclass(frozen=True, slots=True)
class Build:
    """One compiled specialisation: Triton's CompiledKernel and what it was compiled with."""

    name: str
    config: KernelConfig
    compiled: Any


@dataclass(frozen=True, slots=True)
class Plan:
    """A specialisation that has not been compiled. digest: the first digits of Specialisation.digest."""

    name: str
    config: KernelConfig
    digest: str


def compile_case(spec: KernelSpec, case: Case, target: Target) -> list[Build]:
    """Every kernel that spec's launcher starts for the case, compiled for the target.

    KernelError that names kernel, case and target, with the compiler's message, if it cannot be compiled.
    """
    return [
        Build(launch.kernel.__name__, launch.config, compiled)
        for launch, compiled in _on_meta(spec, case, target, compile_specialisation)
    ]


def plan_case(spec: KernelSpec, case: Case, target: Target) -> list[Plan]:
    """What compile_case would compile, in the same order, in milliseconds. KernelError as there."""
    return [
        Plan(launch.kernel.__name__, launch.config, specialisation.digest[:_DIGEST])
        for launch, specialisation in _on_meta(spec, case, target, lambda found: found)
    ]


def compile_specialisation(specialisation: Specialisation, *, keep: bool = True) -> Any:
    """Triton's CompiledKernel of it. keep: in Triton's own cache, too, and take it from there.

    Raises what Triton raises. Compiles one at a time in a process: Triton's settings are the process's.
    """
    names = list(specialisation.signature)
    backend = make_backend(specialisation.target.for_triton())
    attributes = {}
    for at, kind in enumerate(specialisation.signature.values()):
        marks = kind.partition(":")[2]
        found = ("D" if "16" in marks else "") + ("S" if "2G" in marks else "")
        if found:
            attributes[(at,)] = backend.parse_attr(found)
    source = ASTSource(
        specialisation.kernel,
        {name: kind.partition(":")[0] for name, kind in specialisation.signature.items()},
        {(names.index(name),): value for name, value in specialisation.constants.items()},
        attributes,
    )
    knobs = triton.knobs
    with _compiling, contextlib.ExitStack() as stack:
        # ptxas prints the whole program on an error.
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(knobs.compilation.scope())
        # Paths of the machine that compiles would be in the tables.
        knobs.compilation.disable_line_info = True
        if not keep:
            stack.enter_context(knobs.cache.scope())
            knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="halimede-"))
        return triton.compile(
            source, target=specialisation.target.for_triton(), options=dict(specialisation.options)
        )


def _on_meta(
    spec: KernelSpec, case: Case, target: Target, do: Callable[[Specialisation], _Result]
) -> list[tuple[Launch, _Result]]:
    done: list[tuple[Launch, _Result]] = []

    def intercept(launch: Launch) -> None:
        done.append((launch, do(launch.specialise(target))))

    with intercepting(target, intercept), torch.device("meta"):
        try:
            spec.launcher(**case.make(_META))
        except KernelError:
            raise
        except Exception as error:
            raise KernelError(
                f"{spec.name} ({case.name}) cannot be compiled for {target.name} by Triton "
                f"{triton.__version__}: {type(error).__name__}: {error}"
            ) from error
    return done
