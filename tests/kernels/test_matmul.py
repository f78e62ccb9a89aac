"""matmul over a prepared weight against its reference: every pair of types, in both forms and in one."""

import pytest
import torch
from tolerances import assert_kernel_close

from halimede.engine.executor.device import cpu_has_bfloat16
from halimede.kernels import matmul as matmul_module
from halimede.kernels.matmul import matmul, matmul_reference, pack_weight

TYPES = {  # of the weight and of x
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16 weight": (torch.bfloat16, torch.float32),
    "float16 weight": (torch.float16, torch.float32),
}
SHAPES = [(1, 1), (33, 7), (96, 64), (130, 48)]


def _random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _tolerance(weight: torch.Tensor, x: torch.Tensor, *, alone: bool) -> str:
    """One row of float32 x is rounded to a narrower weight's type."""
    return f"matmul of {weight.dtype}" if alone and weight.dtype != x.dtype else "matmul"


@pytest.mark.parametrize(("weight_type", "x_type"), TYPES.values(), ids=TYPES.keys())
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_matmul(
    out_features: int,
    in_features: int,
    rows: int,
    bias: bool,
    weight_type: torch.dtype,
    x_type: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = _random(out_features, in_features, dtype=weight_type, seed=0) / in_features**0.5
    x = _random(rows, in_features, dtype=x_type, seed=1)
    b = _random(out_features, dtype=x_type, seed=2) if bias else None
    packed = pack_weight(weight, x_type)
    assert packed is not None or (x_type == torch.bfloat16 and not cpu_has_bfloat16())
    enabled = torch._C._get_mkldnn_enabled()
    expected = matmul_reference(x, weight, b)
    op = _tolerance(weight, x, alone=rows == 1)
    assert_kernel_close(matmul(x, packed, weight, b), expected, op)
    monkeypatch.setattr(matmul_module, "_WIDENED_ELEMENTS", 100)  # several pieces
    assert_kernel_close(matmul(x, None, weight, b), expected, op)
    if packed is not None:
        assert_kernel_close(matmul(x, packed, None, b), expected, "matmul")
    assert torch._C._get_mkldnn_enabled() == enabled


@pytest.mark.parametrize(("weight_type", "x_type"), TYPES.values(), ids=TYPES.keys())
def test_rows_of_a_larger_tensor(weight_type: torch.dtype, x_type: torch.dtype) -> None:
    weight = _random(24, 16, dtype=weight_type, seed=0)
    x = _random(6, 2, 16, dtype=x_type, seed=1)[:, 0]
    packed = pack_weight(weight, x_type)
    for form in [(packed, weight), (None, weight), *([(packed, None)] if packed is not None else [])]:
        assert_kernel_close(matmul(x, *form, None), matmul_reference(x, weight, None), "matmul")


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("fault", ["plain", "packed"])
@pytest.mark.parametrize(("weight_type", "x_type"), TYPES.values(), ids=TYPES.keys())
def test_a_broken_product_is_noticed(
    fault: str, weight_type: torch.dtype, x_type: torch.dtype, rows: int
) -> None:
    weight = _random(24, 16, dtype=weight_type, seed=0)
    x = _random(rows, 16, dtype=x_type, seed=1)
    broken = weight.roll(1, 1)
    packed = pack_weight(broken, x_type) if fault == "packed" else None
    wrong = matmul(x, packed, broken if packed is None else None, None)
    with pytest.raises(AssertionError):
        op = _tolerance(weight, x, alone=rows == 1)
        assert_kernel_close(wrong, matmul_reference(x, weight, None), op)


def test_float16_activations_are_left_to_torch() -> None:
    assert pack_weight(torch.ones(8, 8), torch.float16) is None
