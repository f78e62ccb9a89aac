"""silu_and_mul and gelu_tanh_and_mul against their references, and that a wrong one is noticed."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_kernel_close

from halimede.kernels.activation import (
    gelu_tanh_and_mul,
    gelu_tanh_and_mul_reference,
    silu_and_mul,
    silu_and_mul_reference,
)

Op = Callable[[torch.Tensor], torch.Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = ((silu_and_mul, silu_and_mul_reference), (gelu_tanh_and_mul, gelu_tanh_and_mul_reference))


@pytest.mark.parametrize(("op", "reference"), OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 10), (5, 254), (2, 1536), (0, 8)])
def test_against_the_reference(shape: tuple[int, int], dtype: torch.dtype, op: Op, reference: Op) -> None:
    x = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    before = x.clone()
    assert_kernel_close(op(x), reference(x), "activation")
    assert torch.equal(x, before)


@pytest.mark.parametrize(("op", "reference"), OPS)
def test_far_from_zero(op: Op, reference: Op) -> None:
    x = torch.tensor([[-200.0, 200.0, 0.0, 3.0, 3.0, 3.0]])
    assert_kernel_close(reference(x), torch.tensor([[0.0, 600.0, 0.0]]), "activation")
    assert_kernel_close(op(x), torch.tensor([[0.0, 600.0, 0.0]]), "activation")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_broken_activation_is_noticed(dtype: torch.dtype) -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    gate, up = x.chunk(2, dim=-1)
    expected = silu_and_mul_reference(x)
    for broken in (F.silu(up) * gate, F.gelu(gate) * up, F.silu(gate) + up):
        with pytest.raises(AssertionError):
            assert_kernel_close(broken, expected, "activation")


def test_the_exact_gelu_is_noticed() -> None:
    """The two forms of GELU differ by 5e-4 at most, which float16 and bfloat16 may not show."""
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    gate, up = x.chunk(2, dim=-1)
    with pytest.raises(AssertionError):
        assert_kernel_close(F.gelu(gate) * up, gelu_tanh_and_mul_reference(x), "activation")
