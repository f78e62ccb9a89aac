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
    prepared = pack_weight(weight)
    assert prepared is not None, "this build of torch has no oneDNN"
    enabled = torch._C._get_mkldnn_enabled()
    assert_kernel_close(matmul(x, prepared, b), matmul_reference(x, weight, b), "norm")
    assert torch._C._get_mkldnn_enabled() == enabled


def test_rows_of_a_larger_tensor() -> None:
    weight = _random(24, 16, dtype=torch.bfloat16, seed=0)
    prepared = pack_weight(weight)
    assert prepared is not None
    x = _random(6, 2, 16, dtype=torch.bfloat16, seed=1)[:, 0]
    assert_kernel_close(matmul(x, prepared, None), matmul_reference(x, weight, None), "norm")


def test_a_float32_weight_is_kept_once_a_bfloat16_one_for_single_rows_too() -> None:
    plain = _random(8, 8, dtype=torch.float32, seed=0)
    assert pack_weight(plain).plain is None  # type: ignore[union-attr]
    assert pack_weight(plain.bfloat16()).plain is not None  # type: ignore[union-attr]
    assert pack_weight(plain.half()) is None
