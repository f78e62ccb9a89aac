"""One row times a weight in the form of a table of bags, and which weights have that form."""

import pytest
import torch
from tolerances import assert_kernel_close

from halimede.engine.layers.linear import Linear
from halimede.kernels.matmul import matmul_reference
from halimede.kernels.matmul_bags import bag_product, table_of

DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form is right on every CPU, and only chosen with AVX2."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


def _random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("x_dtype", [torch.float32, None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 1), (64, 7), (192, 64), (640, 130)])
def test_bag_product(
    out_features: int, in_features: int, dtype: torch.dtype, x_dtype: torch.dtype | None
) -> None:
    weight = _random(out_features, in_features, dtype=dtype, seed=0) / in_features**0.5
    x = _random(1, in_features, dtype=x_dtype or dtype, seed=1)
    table = table_of(weight)
    assert table is not None
    y = bag_product(x, table)
    assert y.dtype == x.dtype
    expected = matmul_reference(x, weight, None).float()
    assert_kernel_close(y.float(), expected, f"matmul of {dtype}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_broken_table_is_noticed(dtype: torch.dtype) -> None:
    weight, x = _random(128, 32, dtype=dtype, seed=0), _random(1, 32, dtype=torch.float32, seed=1)
    for broken in (weight.roll(1, 0), weight.roll(1, 1), weight * 1.03):
        table = table_of(broken)
        assert table is not None
        with pytest.raises(AssertionError):
            assert_kernel_close(
                bag_product(x, table), matmul_reference(x, weight, None), f"matmul of {dtype}"
            )


def test_only_one_row_is_taken() -> None:
    with pytest.raises(AssertionError, match="x has 2"):
        bag_product(torch.ones(2, 8), torch.ones(8, 64, dtype=torch.float16))


def test_what_has_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert table_of(torch.ones(65, 8, dtype=torch.float16)) is None
    assert table_of(torch.ones(64, 8)) is None
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert table_of(torch.ones(64, 8, dtype=torch.float16)) is None


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows_out", [64, 128])
def test_a_layer_that_has_one(rows_out: int, dtype: torch.dtype, bias: bool, shared: bool) -> None:
    layer = Linear(24, rows_out, bias=bias)
    weight, b = _random(rows_out, 24, dtype=dtype, seed=0), _random(rows_out, dtype=dtype, seed=1)
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    if bias:
        layer.bias = torch.nn.Parameter(b, requires_grad=False)
    held = layer.weight
    layer.prepare(torch.float32, shared=shared)
    assert layer.table is not None
    assert layer.weight.numel() == 0
    assert (layer.table.data_ptr() == held.data_ptr()) is not shared
    assert torch.equal(held, weight) is shared
    for rows in (1, 3):
        x = _random(rows, 24, dtype=torch.float32, seed=2)
        expected = matmul_reference(x, weight, b if bias else None)
        torch.testing.assert_close(layer(x), expected, rtol=1e-2, atol=6e-2)
