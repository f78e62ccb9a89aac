"""Products of 8-bit codes where test_scaled_matmul.py has one case: FP8 of CDNA 3, blocks of several groups;
and the machine code of every signature on Hopper."""

import itertools
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from tolerances import assert_kernel_close

from halimede.errors import KernelError
from halimede.kernels import launch
from halimede.kernels.compile import compile_case
from halimede.kernels.gpu import scaled_cases
from halimede.kernels.gpu.scaled_cases import reference
from halimede.kernels.gpu.scaled_matmul import scaled_matmul
from halimede.kernels.gpu.scaled_operand import ScaledOperand, int8_operand
from halimede.kernels.inspect import sass
from halimede.kernels.spec import all_kernels
from halimede.kernels.target import TARGETS
from halimede.kernels.warp_group_hazards import overwritten_operands

CPU = torch.device("cpu")
ROWS = (1, 3, 16, 17, 64, 130)
INT8 = torch.int8
KINDS: dict[str, dict[str, Any]] = {
    "tokens": {"inner": 203},
    "static": {"inner": 203, "static": True},
    "blocks of 128 x 128": {"inner": 512, "block": (128, 128)},
    "blocks of 64 x 256": {"inner": 512, "block": (64, 256)},
    "blocks of no whole number": {"inner": 384, "block": (48, 256)},
}
SPEC = all_kernels()["scaled_matmul"]


def _combinations() -> Iterator[Any]:
    """Every kind with every number of rows on both; types of the result in turn."""
    types = itertools.cycle((torch.float16, torch.bfloat16, torch.float32))
    for (name, kind), rows, target in itertools.product(KINDS.items(), ROWS, ("gfx942", "sm_90")):
        yield pytest.param(rows, kind, target, next(types), id=f"{name}-{rows}-{target}")


def _operand_and(given: dict[str, Any]) -> tuple[ScaledOperand, dict[str, Any]]:
    rest = {key: value for key, value in given.items() if key not in ("x_scales", "deterministic")}
    return scaled_cases.operand_of(**rest)


@pytest.mark.parametrize(("rows", "kind", "target", "dtype"), list(_combinations()))
def test_fp8_of_either_bias(
    rows: int, kind: dict[str, Any], target: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "INTERPRETED_TARGET", TARGETS[target])
    torch.manual_seed(rows)
    given = scaled_cases._case("", rows, size=75, dtype=dtype, bias=True, **kind).make(CPU)
    weight, rest = _operand_and(given)
    assert weight.scaling.kind == ("fnuz" if target == "gfx942" else "fp8")
    (expected,) = reference(**given)
    assert_kernel_close(
        scaled_matmul(given["x"], given["x_scales"], weight, **rest), expected, "scaled matmul"
    )


def test_one_zero_for_rows_that_are_scaled_apart() -> None:
    torch.manual_seed(0)
    given = scaled_cases._case("", 17, 131, 70, INT8, zeros="one").make(CPU)
    weight, rest = _operand_and(given)
    (expected,) = reference(**given)
    assert_kernel_close(
        scaled_matmul(given["x"], given["x_scales"], weight, **rest), expected, "scaled matmul"
    )


def test_zeros_that_are_strided_or_not_for_the_rows() -> None:
    weight = int8_operand(torch.ones(64, 128, dtype=INT8), torch.ones(64), has_sums=True)
    x, scales = torch.ones(4, 128, dtype=INT8), torch.ones(4)
    with pytest.raises(KernelError, match=r"contiguous scales .*and zeros"):
        zeros = torch.zeros(8, dtype=torch.int32)[::2]
        scaled_matmul(x, scales, weight, dtype=torch.bfloat16, zeros=zeros)
    with pytest.raises(KernelError, match=r"each row \(4\)"):
        zeros = torch.zeros(3, dtype=torch.int32)
        scaled_matmul(x, scales, weight, dtype=torch.bfloat16, zeros=zeros)


# Machine code.


@cache
def _hopper(name: str) -> str:
    case = next(case for case in SPEC.signatures if case.name == name)
    (build,) = compile_case(SPEC, case, TARGETS["sm_90"])
    return sass(build)


@pytest.mark.parametrize("name", [case.name for case in SPEC.signatures])
def test_codes_are_multiplied_by_warp_groups(name: str) -> None:
    """Whatever the number of rows; and weights that are widened stay in registers unharmed."""
    code = _hopper(name)
    wanted = "IGMMA" if name.startswith("int8") else "HGMMA" if name.startswith("wide") else "QGMMA"
    assert set(re.findall(r"\b([HIQ]GMMA)\b", code)) == {wanted}
    assert overwritten_operands(code) == []


@pytest.mark.parametrize("name", ["int8, zeros, 4096 rows", "blocks of 128, 4096 rows"])
def test_many_rows_are_read_by_the_tensor_memory_accelerator(name: str) -> None:
    code = _hopper(name)
    assert "UTMALDG" in code
    assert not re.search(r"LDGSTS\S*\.128", code), "only scales come in single numbers"
