"""Norms, activations and quantization by Triton kernels, beyond parity: exact codes, fusing, refusals."""

import pytest
import torch

from halimede.errors import KernelError
from halimede.kernels.gpu.activation import activate, activate_quant, silu_and_mul
from halimede.kernels.gpu.layer_norm import add_layer_norm, layer_norm, layer_norm_reference
from halimede.kernels.gpu.norm import add_rms_norm, rms_norm
from halimede.kernels.gpu.norm_quant import add_rms_norm_quant, rms_norm_quant
from halimede.kernels.gpu.quantize import LARGEST_TOKEN, per_token_quant
from halimede.kernels.gpu.rows import aligned_strides
from halimede.kernels.interpret import interpret
from halimede.kernels.launch import Launch, intercepting
from halimede.kernels.spec import Tensors
from halimede.kernels.target import TARGETS

FP8, INT8 = torch.float8_e4m3fn, torch.int8
EPS = 1e-5
QUANTS = [
    pytest.param(
        {"dtype": dtype, "group_size": group_size, "scale": scale}, id=f"{dtype}-{group_size}-{name}"
    )
    for dtype in (FP8, INT8)
    for group_size, scale, name in ((None, None, "dynamic"), (128, None, "dynamic"), (None, 0.03, "static"))
]


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 3).to(dtype)


def _arguments(quant: dict) -> dict:
    scale = quant["scale"]
    return quant | {"scale": None if scale is None else torch.tensor([scale])}


def _equal(actual: Tensors, expected: Tensors) -> bool:
    return all(
        torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
        for ours, theirs in zip(actual, expected, strict=True)
    )


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_float8_codes_are_those_of_torch(target: str) -> None:
    """All values between two codes, ties and beyond the largest; with and without instructions for it."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(FP8).float()
    between = (codes[:-1] + codes[1:]) / 2
    beyond = torch.tensor([448.0, 460.0, 1e30])
    x = torch.cat([codes, between, between * (1 + 2**-20), between * (1 - 2**-20), beyond])
    x = torch.stack([x, -x])

    def run(launch: Launch) -> None:
        interpret(launch.kernel, launch.grid, launch.args, dict(launch.constants))

    with intercepting(TARGETS[target], run):
        actual, _ = per_token_quant(x, FP8, scale=torch.ones(1))
    assert torch.equal(actual.view(torch.uint8), x.clamp(-448, 448).to(FP8).view(torch.uint8))


def test_int8_codes_are_rounded_to_even_and_saturated() -> None:
    x = torch.arange(-600, 601)[None] / 4
    actual, scales = per_token_quant(x, INT8, scale=torch.tensor([0.5]))
    assert torch.equal(actual, (x / 0.5).round().clamp(-128, 127).to(INT8))
    assert torch.equal(scales, torch.tensor([0.5]))


@pytest.mark.parametrize("dtype", [FP8, INT8])
@pytest.mark.parametrize("group_size", [None, 16])
def test_rows_of_zeros_and_of_the_tiniest_values(dtype: torch.dtype, group_size: int | None) -> None:
    x = torch.zeros(3, 32)
    x[1], x[2] = 1e-38, 1e-45
    codes, scales = per_token_quant(x, dtype, group_size)
    assert not codes.float().any()
    assert (scales > 0).all()
    assert scales.shape == ((3,) if group_size is None else (3, 2))
    assert (1 / scales).isfinite().all()


@pytest.mark.parametrize("quant", QUANTS)
def test_a_norm_that_quantizes_gives_the_codes_of_two_kernels(quant: dict) -> None:
    x, weight = _random(3, 256), _random(256, seed=1)
    expected = per_token_quant(rms_norm(x, weight, EPS), **_arguments(quant))
    assert _equal(rms_norm_quant(x, weight, EPS, **_arguments(quant)), expected)


@pytest.mark.parametrize("quant", QUANTS)
def test_an_add_and_norm_that_quantizes_gives_the_codes_of_two_kernels(quant: dict) -> None:
    x, weight, residual = _random(3, 384), _random(384, seed=1), _random(3, 384, seed=2)
    other = residual.clone()
    expected = per_token_quant(add_rms_norm(x, residual, weight, EPS), **_arguments(quant))
    assert _equal(add_rms_norm_quant(x, other, weight, EPS, **_arguments(quant)), expected)
    assert torch.equal(other, residual)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize(("activation", "gated"), [("silu", True), ("gelu_tanh", True), ("relu2", False)])
def test_an_activation_that_quantizes_gives_the_codes_of_two_kernels(
    activation, gated: bool, quant: dict
) -> None:
    x = _random(3, 768 if gated else 384)
    expected = per_token_quant(activate(x, activation, gated=gated), **_arguments(quant))
    assert _equal(activate_quant(x, activation, gated=gated, **_arguments(quant)), expected)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations_of_huge_values_are_finite(activation) -> None:
    x = torch.tensor([[-3e38, -1e30, -1e10, -100.0, 0.0, 100.0, 1e10, 1e30]])
    expected = x.clamp(min=0)
    torch.testing.assert_close(activate(x, activation, gated=False), expected, rtol=1e-6, atol=1e-30)


def test_layer_norm_does_not_lose_digits_to_a_large_mean() -> None:
    x = 1000 + _random(2, 100, dtype=torch.float32)
    weight, bias = torch.ones(100), torch.zeros(100)
    actual = layer_norm(x, weight, bias, EPS)
    torch.testing.assert_close(actual, layer_norm_reference(x, weight, bias, EPS), rtol=0, atol=1e-4)


def test_rows_whose_strides_are_no_multiple_of_16_bytes_have_unit_1() -> None:
    assert aligned_strides((4, 3), (72, 24, 1), torch.bfloat16) == (8, [9, 3])
    assert aligned_strides((12,), (23, 1), torch.bfloat16) == (1, [23])
    assert aligned_strides((1,), (23, 1), torch.float32) == (4, [0])


@pytest.mark.parametrize("x", [torch.zeros(2, 3, 64), torch.zeros(64, 2).T])
def test_inputs_of_a_wrong_layout_are_refused(x: torch.Tensor) -> None:
    weight = torch.ones(64)
    for call in (
        lambda: per_token_quant(x, INT8),
        lambda: silu_and_mul(x),
        lambda: layer_norm(x, weight, None, EPS),
        lambda: rms_norm_quant(x, weight, EPS),
    ):
        with pytest.raises(KernelError, match="unit stride"):
            call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.float16}, "not to torch.float16"),
        ({"dtype": FP8, "group_size": 128}, "group_size=128"),
        ({"dtype": FP8, "group_size": 24}, "power of two"),
        ({"dtype": INT8, "scale": torch.ones(2)}, "one float32"),
        ({"dtype": INT8, "scale": torch.ones(1), "group_size": 32}, "without group_size"),
    ],
)
def test_options_that_clash_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        per_token_quant(torch.zeros(2, 192), **arguments)


def test_what_else_is_refused() -> None:
    with pytest.raises(KernelError, match="too long for a scale per token"):
        per_token_quant(torch.zeros(1, LARGEST_TOKEN + 16), INT8)
    with pytest.raises(KernelError, match="'tanh' is unknown"):
        activate(torch.zeros(1, 4), "tanh", gated=False)
    with pytest.raises(KernelError, match="2I"):
        silu_and_mul(torch.zeros(1, 5))
    x, weight = torch.zeros(2, 8), torch.ones(8)
    for add in (
        lambda r: add_layer_norm(x, r, weight, None, EPS),
        lambda r: add_rms_norm_quant(x, r, weight, EPS),
    ):
        for residual in (x[:1], x.half(), torch.zeros(2, 16)[:, :8]):
            with pytest.raises(KernelError, match="contiguous residual"):
                add(residual)
