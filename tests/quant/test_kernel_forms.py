"""Quantized weights laid out for the Triton kernels, which are interpreted, beside what they stand for."""

from dataclasses import replace

import pytest
import torch

from halimede.engine.quant.canonical import Fp8Weight, GroupedWeight, Int8Weight
from halimede.engine.quant.forms.base import Placement
from halimede.engine.quant.forms.kernel_wna16 import KernelWNA16
from halimede.engine.quant.forms.make import make_form
from halimede.engine.quant.forms.scaled import KernelFP8, KernelW8A8
from halimede.kernels import launch
from halimede.kernels.target import TARGETS

CPU = torch.device("cpu")


def _grouped(rows: int = 48, columns: int = 192, bits: int = 4, group: int = 64) -> GroupedWeight:
    torch.manual_seed(rows)
    groups = (rows, columns // group)
    return GroupedWeight(
        codes=torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8),
        bits=bits,
        group_size=group,
        scales=(torch.rand(groups) + 0.5).to(torch.float16) * 2.0 ** (2 - bits) * 0.1,
        zero=torch.randint(0, 1 << bits, groups, dtype=torch.uint8),
    )


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act_order", [False, True])
def test_grouped_weight(dtype: torch.dtype, act_order: bool) -> None:
    weight = _grouped()
    if act_order:
        weight = replace(weight, permutation=torch.randperm(192))
    form = make_form([weight], Placement(CPU, dtype, interpreted=True))
    assert isinstance(form, KernelWNA16)
    x = torch.randn(5, 192).to(dtype)
    expected = x.double() @ weight.dequantize().double().t()
    assert _error(form(x), expected) < 5e-3
    bias = torch.randn(48).to(dtype)
    assert form.take_bias(bias)
    assert _error(form(x), expected + bias.double()) < 5e-3
    assert not form.make_gated("silu"), "its bias would be in another order"
    ids = torch.tensor([47, 0, 13])
    torch.testing.assert_close(form.rows(ids), weight.dequantize()[ids])


def test_gate_and_up_with_their_activation() -> None:
    weight = _grouped(rows=64)
    form = make_form([weight], Placement(CPU, torch.bfloat16, interpreted=True))
    x = torch.randn(3, 192).to(torch.bfloat16)
    gate, up = (x.double() @ weight.dequantize().double().t()).chunk(2, 1)
    assert form.make_gated("silu")
    assert _error(form(x), torch.nn.functional.silu(gate) * up) < 8e-3
    assert not form.make_gated("silu"), "it is already"


def test_rows_that_cannot_be_paired_stay() -> None:
    form = make_form([_grouped(rows=40)], Placement(CPU, torch.bfloat16, interpreted=True))
    assert not form.make_gated("silu")


def test_groups_without_a_layout_and_float32_go_through_torch() -> None:
    odd = _grouped(columns=192, group=24)
    for weight, dtype in ((odd, torch.bfloat16), (_grouped(), torch.float32)):
        form = make_form([weight], Placement(CPU, dtype, interpreted=True))
        assert not isinstance(form, KernelWNA16)
        x = torch.randn(2, 192).to(dtype)
        assert _error(form(x), x.double() @ weight.dequantize().double().t()) < 8e-3


def test_on_meta_a_form_has_the_shapes_of_a_real_one() -> None:
    weight = _grouped()
    meta = replace(
        weight,
        codes=weight.codes.to("meta"),
        scales=weight.scales.to("meta"),
        zero=torch.empty(weight.scales.shape, dtype=torch.uint8, device="meta"),
    )
    real = make_form([weight], Placement(CPU, torch.bfloat16, interpreted=True))
    form = make_form([meta], Placement(torch.device("meta"), torch.bfloat16))
    assert {name: (b.shape, b.dtype) for name, b in form.named_buffers()} == {
        name: (b.shape, b.dtype) for name, b in real.named_buffers()
    }


def _fp8(block: tuple[int, int], static: bool = False, rows: int = 70, columns: int = 256) -> Fp8Weight:
    torch.manual_seed(rows)
    grid = tuple(-(-size // of) for size, of in zip((rows, columns), block, strict=True))
    codes = torch.randn(rows, columns).mul_(60).clamp_(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.tensor([0.02]) if static else None
    return Fp8Weight(codes, (torch.rand(grid) + 0.5) * 1e-3, block, scale)


@pytest.fixture(params=["sm_90", "sm_80", "gfx942"])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """FP8 is multiplied, widened, or multiplied in another form of FP8."""
    monkeypatch.setattr(launch, "INTERPRETED_TARGET", TARGETS[request.param])
    return str(request.param)


@pytest.mark.parametrize("block", [(1, 256), (70, 256), (128, 128)])
def test_fp8(block: tuple[int, int], target: str) -> None:
    weight = _fp8(block)
    form = make_form([weight], Placement(CPU, torch.bfloat16, interpreted=True))
    assert isinstance(form, KernelFP8)
    assert (form.quantizes is None) == (target == "sm_80")
    x = torch.randn(5, 256).to(torch.bfloat16)
    bias = torch.randn(70).to(torch.bfloat16)
    assert form.take_bias(bias)
    rounding = 5e-3 if target == "sm_80" else 4e-2  # 3 bits of the activations' mantissa
    assert _error(form(x), x.double() @ weight.dequantize().double().t() + bias.double()) < rounding
    ids = torch.tensor([69, 0, 13])
    if target != "gfx942":
        torch.testing.assert_close(form.rows(ids), weight.dequantize()[ids])


def test_fp8_with_a_calibrated_scale() -> None:
    weight = _fp8((1, 256), static=True)
    form = make_form([weight], Placement(CPU, torch.bfloat16, interpreted=True))
    x = torch.randn(5, 256).to(torch.bfloat16)
    codes = (x.float() / 0.02).clamp(-448, 448).to(torch.float8_e4m3fn)
    expected = (codes.double() * 0.02) @ weight.dequantize().double().t()
    assert _error(form(x), expected) < 4e-3


def test_blocks_without_a_kernel_go_through_torch() -> None:
    weight = _fp8((64, 64))
    form = make_form([weight], Placement(CPU, torch.bfloat16, interpreted=True))
    assert not isinstance(form, KernelFP8)


@pytest.mark.parametrize(
    ("symmetric", "static_scale", "static_zero"),
    [(True, None, 0), (False, None, 0), (True, 0.03, 0), (False, 0.03, -7)],
)
def test_int8_is_as_on_the_cpu(symmetric: bool, static_scale: float | None, static_zero: int) -> None:
    torch.manual_seed(0)
    codes = torch.randint(-127, 128, (70, 200), dtype=torch.int8)
    scale = None if static_scale is None else torch.tensor([static_scale])
    weight = Int8Weight(codes, torch.rand(70) * 1e-3, symmetric, scale, static_zero)
    form = make_form([weight], Placement(CPU, torch.bfloat16, interpreted=True))
    assert isinstance(form, KernelW8A8)
    plain = make_form([weight], Placement(CPU, torch.bfloat16))
    x = torch.randn(5, 200).to(torch.bfloat16)
    assert _error(form(x), plain(x)) < 1.2e-2  # activations between two codes may be rounded either way
    ids = torch.tensor([69, 0, 13])
    assert torch.equal(form.rows(ids), plain.rows(ids))
