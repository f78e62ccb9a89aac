"""Every Triton kernel against its reference in the interpreter, and that a broken one is noticed."""

from pathlib import Path

import pytest
from kernel_parity import check_case, notices

from halimede.kernels.spec import Case, Fault, KernelSpec, all_kernels

CASES = [
    pytest.param(spec, case, id=f"{spec.name}-{case.name}")
    for spec in all_kernels().values()
    for case in spec.cases
]
FAULTS = [
    pytest.param(spec, fault, id=f"{spec.name}-{number}")
    for spec in all_kernels().values()
    for number, fault in enumerate(spec.faults)
]


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_kernel_equals_its_reference(spec: KernelSpec, case: Case) -> None:
    check_case(spec, case)


@pytest.mark.parametrize(("spec", "fault"), FAULTS)
def test_a_broken_kernel_is_noticed(spec: KernelSpec, fault: Fault, tmp_path: Path) -> None:
    assert notices(spec, fault, tmp_path), f"{spec.name} passes with {fault.new!r} for {fault.old!r}"


def test_every_kernel_is_broken_on_purpose() -> None:
    assert all(spec.faults for spec in all_kernels().values())
