"""FP8 products against float64: every code, every kind of scale, sizes that blocks do not divide."""

import math

import pytest
import torch
from tolerances import assert_kernel_close

from halimede.engine.quant.canonical import Fp8Weight
from halimede.engine.quant.forms.base import Placement
from halimede.engine.quant.forms.fp8 import FP8
from halimede.kernels import matmul_codes
from halimede.kernels.matmul_fp8 import dequantize_fp8, fp8_product, widen_fp8

FINITE = [code for code in range(256) if code & 127 != 127]


def _value(code: int) -> float:
    """Of an e4m3 code: a sign, four bits of exponent with the bias 7, three of fraction."""
    exponent, fraction = code >> 3 & 15, code & 7
    magnitude = fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return math.copysign(magnitude, -1 if code & 128 else 1)


VALUES = torch.tensor([_value(code) for code in range(256)], dtype=torch.float64)


def test_all_codes_are_widened_exactly() -> None:
    codes = torch.tensor(FINITE, dtype=torch.uint8)
    widened = widen_fp8(codes.view(torch.float8_e4m3fn))
    assert widened.dtype == torch.bfloat16
    assert torch.equal(widened.double(), VALUES[FINITE])
    assert torch.equal(widened.signbit(), codes >= 128)


def _weight(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    places = torch.randint(len(FINITE), (rows, columns), generator=generator)
    return torch.tensor(FINITE, dtype=torch.uint8)[places]


def _scales(shape: tuple[int, int], block: tuple[int, int]) -> torch.Tensor:
    """Different for every block; products are of size 1."""
    counts = [-(-size // of) for size, of in zip(shape, block, strict=True)]
    generator = torch.Generator().manual_seed(7)
    return (0.5 + torch.rand(counts, generator=generator)) / (64 * math.sqrt(shape[1]))


def _expected(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    rows, columns = (torch.arange(size) // of for size, of in zip(codes.shape, block, strict=True))
    return VALUES[codes.int()] * scales.double()[rows][:, columns]


BLOCKS = [(1, 67), (1, 16), (32, 16), (128, 128)]  # rows, groups, blocks, all


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products(
    dtype: torch.dtype, rows: int, block: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul_codes, "_PIECE", 67 * 5)  # pieces that end within a block, the last one short
    codes, x = _weight(33, 67), torch.randn(rows, 67, generator=torch.Generator().manual_seed(rows)).to(dtype)
    scales = _scales((33, 67), block)
    exact = _expected(codes, scales, block)
    y = fp8_product(x, codes.view(torch.float8_e4m3fn), scales, block)
    assert y.dtype == dtype
    # The weight is rounded to the type of the product.
    expected = x.double() @ exact.to(dtype).double().t()
    if dtype == torch.float16:
        torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-3)
    else:
        assert_kernel_close(y, expected.to(dtype), "matmul")


@pytest.mark.parametrize("block", BLOCKS)
def test_rows(block: tuple[int, int]) -> None:
    codes, scales = _weight(33, 67), _scales((33, 67), block)
    weight, exact = codes.view(torch.float8_e4m3fn), _expected(codes, scales, block).float()
    assert torch.equal(dequantize_fp8(weight, scales, block, slice(3, 33)), exact[3:])
    form = FP8(Fp8Weight(weight, scales, block), Placement(torch.device("cpu"), torch.bfloat16))
    ids = torch.tensor([32, 0, 31, 0])
    assert torch.equal(form.rows(ids), exact[ids])
    assert torch.equal(Fp8Weight(weight, scales, block).dequantize(), exact)
