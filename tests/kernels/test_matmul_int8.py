"""INT8 products against float64, and the rounding of activations against compressed-tensors' own."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from halimede.engine.quant.canonical import Int8Weight
from halimede.engine.quant.forms.base import Placement
from halimede.engine.quant.forms.w8a8 import W8A8
from halimede.kernels.matmul_int8 import int8_product, quantize_static, quantize_tokens

SHAPES = [(33, 65), (64, 128), (7, 1), (1, 333)]


def _codes(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


def _activations(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of all sizes, shifted to one side in some rows; of zeros, of one sign, of tiny numbers in others."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    x *= torch.logspace(-3, 3, rows)[:, None]
    x[::3] += 2 * x[::3].abs().amax(1, keepdim=True)
    x[rows // 2] = 0
    x[-1] = x[-1].abs() + 1
    x[-2:-1] = -x[-1] / 3
    x[0] *= 1e-9
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic_activations_are_rounded_as_the_package_does(symmetric: bool, dtype: torch.dtype) -> None:
    x = _activations(17, 65, dtype)
    args = QuantizationArgs(num_bits=8, strategy="token", dynamic=True, symmetric=symmetric)
    wide = x.float()[None]  # a sequence: of two dimensions the package would take one scale
    expected_scales, expected_zeros = compute_dynamic_scales_and_zp(wide, args, torch.nn.Linear(1, 1))
    expected = quantize(wide, expected_scales, expected_zeros, args, dtype=torch.int8)
    codes, scales, zeros = quantize_tokens(x, symmetric=symmetric)
    assert torch.equal(scales, expected_scales[0])
    assert torch.equal(zeros, expected_zeros[0].float())
    assert torch.equal(codes, expected[0])
    assert bool((zeros != 0).any()) != symmetric


@pytest.mark.parametrize("zero", [0, -128, 77])
def test_static_activations_are_rounded_as_the_package_does(zero: int) -> None:
    x, scale = _activations(17, 65), torch.tensor([0.0371])
    args = QuantizationArgs(num_bits=8, strategy="tensor", symmetric=zero == 0)
    zeros = torch.tensor([zero], dtype=torch.int8)
    expected = quantize(x[None], scale, zeros, args, dtype=torch.int8)[0]
    assert torch.equal(quantize_static(x, scale, zero), expected)
    assert expected.min() == -128
    assert expected.max() == 127


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_sums_are_exact(out_features: int, in_features: int, rows: int) -> None:
    codes, weight = _codes(rows, in_features, seed=0), _codes(out_features, in_features, seed=1)
    zeros, sums = _codes(rows, 1, seed=2).float(), weight.sum(1, dtype=torch.int32)
    plain = codes.double() @ weight.double().t()
    assert torch.equal(int8_product(codes, weight).double(), plain)
    shifted = (codes.double() - zeros.double()) @ weight.double().t()
    assert torch.equal(int8_product(codes, weight, zeros, sums).double(), shifted)
    shifted = (codes.double() + 9) @ weight.double().t()
    assert torch.equal(int8_product(codes, weight, -9, sums).double(), shifted)


@pytest.mark.parametrize("value", [-128, 127])
def test_nothing_saturates(value: int) -> None:
    """Not even between: instructions before VNNI add pairs of products in 16 bits."""
    codes, weight = torch.full((2, 4097), value).to(torch.int8), torch.full((3, 4097), -128).to(torch.int8)
    expected = torch.full((2, 3), float(-128 * value * 4097))
    assert torch.equal(int8_product(codes, weight), expected)


def test_a_zero_point_cancels_exactly() -> None:
    """Where all that is left of sums beyond 2^24, which float32 would round, is a little."""
    weight = torch.full((3, 9001), 127).to(torch.int8)
    codes = torch.full((1, 9001), 127).to(torch.int8)
    codes[0, 0] = 126
    y = int8_product(codes, weight, torch.tensor([[127.0]]), weight.sum(1, dtype=torch.int32))
    assert y.tolist() == [[-127.0] * 3]


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("static", [None, 0.31])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_form(symmetric: bool, static: float | None, rows: int) -> None:
    weight, scales = _codes(33, 65, seed=3), torch.rand(33, generator=torch.Generator().manual_seed(4))
    x, scale = _activations(rows, 65), None if static is None else torch.tensor([static])
    zero = 0 if symmetric or static is None else -21
    form = W8A8(
        Int8Weight(weight, scales, symmetric, scale, zero), Placement(torch.device("cpu"), torch.float32)
    )
    if scale is None:
        codes, of_tokens, zeros = quantize_tokens(x, symmetric=symmetric)
        rounded = (codes.double() - zeros) * of_tokens.double()
    else:
        rounded = (quantize_static(x, scale, zero).double() - zero) * scale.double()
    expected = rounded @ (weight.double() * scales.double()[:, None]).t()
    torch.testing.assert_close(form(x).double(), expected, rtol=3e-7, atol=0)
    assert torch.equal(form.rows(torch.tensor([32, 0])), (weight * scales[:, None])[[32, 0]])
