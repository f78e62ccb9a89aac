"""RMSNorm against its reference, and that the tolerance would notice a wrong one."""

import pytest
import torch
from tolerances import assert_kernel_close

from halimede.kernels.norm import (
    add_rms_norm,
    add_rms_norm_reference,
    doubled_weight,
    rms_norm,
    rms_norm_reference,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (3, 7), (5, 64), (2, 577), (4, 3, 24), (0, 8))


def _random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 3).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = _random(*shape, dtype=dtype), _random(shape[-1], dtype=dtype, seed=1)
    before = x.clone()
    for doubled in (None, doubled_weight(weight)):
        actual = rms_norm(x, weight, 1e-6, doubled)
        assert_kernel_close(actual, rms_norm_reference(x, weight, 1e-6), "norm")
    assert torch.equal(x, before)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) == 2])
def test_add_rms_norm_changes_the_residual_and_nothing_else(
    shape: tuple[int, ...], dtype: torch.dtype, few: bool
) -> None:
    x, residual = _random(*shape, dtype=dtype), _random(*shape, dtype=dtype, seed=1)
    weight, before = _random(shape[-1], dtype=dtype, seed=2), x.clone()
    expected, total = add_rms_norm_reference(x, residual, weight, 1e-5)
    doubled = doubled_weight(weight) if few else None
    assert_kernel_close(add_rms_norm(x, residual, weight, 1e-5, doubled), expected, "norm")
    assert torch.equal(residual, total)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_weight_is_not_rounded_and_neither_is_the_norm_before_the_product(
    dtype: torch.dtype,
) -> None:
    """Gemma's way, which is one rounding: equal to the reference but for a last bit now and then."""
    x, weight = _random(50, 577, dtype=dtype), 1 + 0.01 * _random(577, dtype=torch.float32, seed=1)
    expected = rms_norm_reference(x, weight, 1e-6)

    def differing(y: torch.Tensor) -> float:
        return (y != expected).float().mean().item()

    assert rms_norm(x, weight, 1e-6).dtype == dtype
    assert differing(rms_norm(x, weight, 1e-6)) < 1e-3
    assert (
        differing(torch.cat([rms_norm(row, weight, 1e-6, doubled_weight(weight)) for row in x.split(16)]))
        < 1e-3
    )
    assert differing(add_rms_norm(torch.zeros_like(x), x.clone(), weight, 1e-6)) < 1e-3
    assert differing(rms_norm(x, weight.to(dtype), 1e-6)) > 0.1


def test_rms_norm_takes_a_slice_of_a_fused_projection() -> None:
    heads = _random(5, 6, 16, dtype=torch.float32)[:, 1:3]
    weight = _random(16, dtype=torch.float32, seed=1)
    assert_kernel_close(rms_norm(heads, weight, 1e-6), rms_norm_reference(heads, weight, 1e-6), "norm")


def test_rms_norm_of_large_bfloat16_values_does_not_overflow() -> None:
    x = torch.full((2, 64), 1e20, dtype=torch.bfloat16)
    assert_kernel_close(
        rms_norm(x[:, :32] * 0 + 1e15, torch.ones(32, dtype=x.dtype), 1e-6),
        torch.ones(2, 32, dtype=x.dtype),
        "norm",
    )


def test_rms_norm_rounds_as_hugging_face_does() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = LlamaRMSNorm(48, 1e-5)
    with torch.no_grad():
        theirs.weight.copy_(_random(48, dtype=torch.float32, seed=1))
    theirs = theirs.to(torch.bfloat16)
    x = _random(9, 48, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x, theirs.weight.detach(), 1e-5), theirs(x).detach())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "fault", ["mean of one element too few", "weight plus one percent", "no square root"]
)
def test_a_broken_norm_is_noticed(fault: str, dtype: torch.dtype) -> None:
    x, weight = _random(8, 64, dtype=dtype), _random(64, dtype=dtype, seed=1)
    wide = x.double()
    mean = wide.square().mean(-1, keepdim=True)
    broken = {
        "mean of one element too few": wide
        / (mean * 64 / 63 * (1.0 if dtype.itemsize == 4 else 1.05)).sqrt(),
        "weight plus one percent": wide / mean.sqrt() * (1.01 if dtype.itemsize == 4 else 1.03),
        "no square root": wide / mean,
    }[fault]
    with pytest.raises(AssertionError):
        assert_kernel_close((broken * weight).to(dtype), rms_norm_reference(x, weight, 1e-6), "norm")
