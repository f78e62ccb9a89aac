"""silu_and_mul against its reference, and that a wrong one is noticed."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_kernel_close

from halimede.kernels.activation import silu_and_mul, silu_and_mul_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 10), (5, 254), (2, 1536), (0, 8)])
def test_silu_and_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    before = x.clone()
    assert_kernel_close(silu_and_mul(x), silu_and_mul_reference(x), "activation")
    assert torch.equal(x, before)


def test_silu_and_mul_far_from_zero() -> None:
    x = torch.tensor([[-200.0, 200.0, 0.0, 3.0, 3.0, 3.0]])
    assert_kernel_close(silu_and_mul(x), torch.tensor([[0.0, 600.0, 0.0]]), "activation")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_broken_activation_is_noticed(dtype: torch.dtype) -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    gate, up = x.chunk(2, dim=-1)
    expected = silu_and_mul_reference(x)
    for broken in (F.silu(up) * gate, F.gelu(gate) * up, F.silu(gate) + up):
        with pytest.raises(AssertionError):
            assert_kernel_close(broken, expected, "activation")
