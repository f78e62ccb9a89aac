"""Compiles kernels for a GPU that need not be there: launchers run on meta tensors, and what they would have
started is compiled.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton

from halimede.errors import KernelError
from halimede.kernels.compiler import Build, compile_specialisation
from halimede.kernels.launch import Launch, intercepting
from halimede.kernels.spec import Case, KernelSpec
from halimede.kernels.specialise import Specialisation
from halimede.kernels.target import Target
from halimede.kernels.tuning import KernelConfig

_META = torch.device("meta")
_DIGEST = 12
_Result = TypeVar("_Result")


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
