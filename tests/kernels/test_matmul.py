"""matmul over a prepared weight against its reference, at one row (a path of its own) and at many."""

import pytest
import torch
from tolerances import assert_kernel_close

from halimede.kernels.matmul import matmul, matmul_reference, pack_weight


def _random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (33, 7), (96, 64), (130, 48)])
def test_matmul(out_features: int, in_features: int, rows: int, bias: bool, dtype: torch.dtype) -> None:
    weight = _random(out_features, in_features, dtype=dtype, seed=0) / in_features**0.5
    x = _random(rows, in_features, dtype=dtype, seed=1)
    b = _random(out_features, dtype=dtype, seed=2) if bias else None
    packed = pack_weight(weight)
    assert packed is not None, "this build of torch has no oneDNN"
    enabled = torch._C._get_mkldnn_enabled()
    assert_kernel_close(matmul(x, packed, weight, b), matmul_reference(x, weight, b), "matmul")
    assert torch._C._get_mkldnn_enabled() == enabled


def test_rows_of_a_larger_tensor() -> None:
    weight = _random(24, 16, dtype=torch.bfloat16, seed=0)
    packed = pack_weight(weight)
    assert packed is not None
    x = _random(6, 2, 16, dtype=torch.bfloat16, seed=1)[:, 0]
    assert_kernel_close(matmul(x, packed, None, None), matmul_reference(x, weight, None), "matmul")


@pytest.mark.parametrize("plain", [False, True])
def test_a_broken_product_is_noticed(plain: bool) -> None:
    weight = _random(24, 16, dtype=torch.bfloat16, seed=0)
    x = _random(1, 16, dtype=torch.bfloat16, seed=1)
    packed = pack_weight(weight.roll(1, 1))
    assert packed is not None
    wrong = matmul(x, packed, weight.roll(1, 1) if plain else None, None)
    with pytest.raises(AssertionError):
        assert_kernel_close(wrong, matmul_reference(x, weight, None), "matmul")


def test_float16_is_left_to_torch() -> None:
    assert pack_weight(torch.ones(8, 8, dtype=torch.float16)) is None
