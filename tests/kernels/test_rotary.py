"""The rotary op against its reference, in place on slices, and that a wrong one is noticed."""

import pytest
import torch
from tolerances import assert_kernel_close

from halimede.kernels.rotary import apply_rotary, apply_rotary_reference, rotary_factors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _case(
    tokens: int, heads: int, head_dim: int, half: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens * 100 + head_dim)
    x = torch.randn(tokens, heads, head_dim, generator=generator).to(dtype)
    angles = torch.rand(tokens, half, generator=generator) * 100
    return x, angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "half"),
    [(1, 1, 2, 1), (5, 3, 16, 8), (7, 6, 24, 12), (3, 2, 80, 16), (4, 9, 64, 32), (0, 2, 8, 4)],
)
def test_apply_rotary(tokens: int, heads: int, head_dim: int, half: int, dtype: torch.dtype) -> None:
    x, cos, sin = _case(tokens, heads, head_dim, half, dtype)
    expected = apply_rotary_reference(x, cos, sin)
    apply_rotary(x, rotary_factors(cos, sin))
    assert_kernel_close(x, expected, "rotary")


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_rotary_on_a_slice_leaves_its_neighbours_alone(dtype: torch.dtype) -> None:
    qkv, cos, sin = _case(6, 8, 16, 8, dtype)
    expected = qkv.clone()
    expected[:, :6] = apply_rotary_reference(qkv[:, :6], cos, sin)
    apply_rotary(qkv[:, :6], rotary_factors(cos, sin))
    assert_kernel_close(qkv, expected, "rotary")
    assert torch.equal(qkv[:, 6:], expected[:, 6:])


def test_position_zero_and_dimensions_past_the_angles_are_unchanged() -> None:
    x, cos, sin = _case(2, 3, 16, 4, torch.float32)
    before = x.clone()
    cos[0], sin[0] = 1, 0
    apply_rotary(x, rotary_factors(cos, sin))
    assert torch.equal(x[0], before[0])
    assert torch.equal(x[1, :, 8:], before[1, :, 8:])
    assert not torch.equal(x[1, :, :8], before[1, :, :8])


def test_wrong_shapes_are_refused() -> None:
    x, cos, sin = _case(4, 2, 16, 8, torch.float32)
    with pytest.raises(AssertionError, match="one row per token"):
        apply_rotary(x[:3], rotary_factors(cos, sin))
    with pytest.raises(AssertionError, match="do not fit"):
        apply_rotary(x[..., :8], rotary_factors(cos, sin))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", ["turned backwards", "neighbouring pairs", "next position"])
def test_a_broken_rotary_is_noticed(fault: str, dtype: torch.dtype) -> None:
    x, cos, sin = _case(6, 4, 16, 8, dtype)
    expected = apply_rotary_reference(x, cos, sin)
    if fault == "turned backwards":
        apply_rotary(x, rotary_factors(cos, -sin))
    elif fault == "next position":
        apply_rotary(x, rotary_factors(cos.roll(1, 0), sin.roll(1, 0)))
    else:
        paired = x.unflatten(-1, (8, 2)).transpose(-1, -2).flatten(-2).contiguous()
        apply_rotary(paired, rotary_factors(cos, sin))
        x = paired.unflatten(-1, (2, 8)).transpose(-1, -2).flatten(-2)
    with pytest.raises(AssertionError):
        assert_kernel_close(x, expected, "rotary")
