"""The product of 8-bit codes: every kind of code and scale, what stays the same whatever runs beside it,
layouts, machine code."""

import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tolerances import assert_kernel_close
from triton.runtime import interpreter

from halimede.errors import KernelError
from halimede.kernels import launch
from halimede.kernels.compile import compile_case
from halimede.kernels.gpu import scaled_cases, scaled_config
from halimede.kernels.gpu.scaled_cases import operand_of, reference
from halimede.kernels.gpu.scaled_matmul import scaled_matmul
from halimede.kernels.gpu.scaled_operand import Scaling, fp8_kind, fp8_operand, int8_operand, supports_block
from halimede.kernels.inspect import sass
from halimede.kernels.spec import Case, all_kernels
from halimede.kernels.target import TARGETS, Target
from halimede.kernels.warp_group_hazards import overwritten_operands

ROWS = (1, 3, 16, 17, 64, 130)
CPU = torch.device("cpu")
INT8, FP8 = torch.int8, torch.float8_e4m3fn
KINDS: dict[str, dict[str, Any]] = {
    "int8": {"kind": INT8},
    "int8, zeros": {"kind": INT8, "zeros": "row"},
    "int8, static": {"kind": INT8, "static": True, "zeros": "one"},
    "fp8, tokens": {},
    "fp8, static": {"static": True},
    "fp8, tensor": {"block": (75, 1 << 20)},
    "fp8, blocks": {"block": (128, 128)},
    "wide": {"wide": True},
    "wide, blocks": {"block": (64, 256), "wide": True},
}


@pytest.fixture(params=["sm_90", "sm_80", "gfx942"])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Target:
    """The interpreter makes this target's choices, and weights are laid out for it."""
    chosen = TARGETS[request.param]
    monkeypatch.setattr(launch, "INTERPRETED_TARGET", chosen)
    return chosen


def _given(rows: int, inner: int, size: int, **kind: Any) -> dict[str, Any]:
    torch.manual_seed(rows * inner + size)
    return scaled_cases._case("", rows, inner, size, **kind).make(CPU)


def _product(given: dict[str, Any]) -> torch.Tensor:
    x, x_scales, rest = given["x"], given["x_scales"], dict(given)
    del rest["x_scales"], rest["deterministic"]
    weight, rest = operand_of(**rest)
    return scaled_matmul(x, x_scales, weight, deterministic=given["deterministic"], **rest)


def _rows_of(given: dict[str, Any], rows: slice) -> dict[str, Any]:
    """The same product for some of the rows alone."""
    count = given["x"].shape[0]
    part = dict(given)
    for name in ("x", "x_scales", "zeros"):
        if part[name] is not None and part[name].shape[0] == count:
            part[name] = part[name][rows].contiguous()
    return part


def _combinations() -> Iterator[Any]:
    """Every kind with every number of rows; types of the result, and biases, in turn."""
    types = itertools.cycle((torch.bfloat16, torch.float16, torch.float32))
    for (name, kind), rows in itertools.product(KINDS.items(), ROWS):
        dtype = torch.bfloat16 if kind.get("wide") else next(types)
        yield pytest.param(rows, kind, dtype, id=f"{name}-{rows}")


@pytest.mark.parametrize(("rows", "kind", "dtype"), list(_combinations()))
def test_every_kind(rows: int, kind: dict[str, Any], dtype: torch.dtype) -> None:
    inner = 512 if "blocks" in kind or kind.get("block", (0, 0))[1] in (128, 256) else 203
    given = _given(rows, inner, 75, dtype=dtype, bias=rows % 2 == 1, **kind)
    (expected,) = reference(**given)
    assert_kernel_close(_product(given), expected, "scaled matmul")


@pytest.mark.parametrize("name", ["int8, zeros", "fp8, tokens", "fp8, blocks"])
def test_every_target(name: str, target: Target) -> None:
    wide = fp8_kind(target) == "wide" and not name.startswith("int8")
    for rows in (3, 130):
        given = _given(rows, 256, 75, wide=wide, **KINDS[name])
        (expected,) = reference(**given)
        assert_kernel_close(_product(given), expected, "scaled matmul")


@pytest.mark.parametrize("name", KINDS)
def test_a_row_alone_is_as_among_others(name: str) -> None:
    given = _given(130, 2048, 70, deterministic=True, **KINDS[name])
    together = _product(given)
    for rows in (slice(0, 1), slice(3, 20), slice(64, 130)):
        assert torch.equal(_product(_rows_of(given, rows)), together[rows])


def _scalings() -> Iterator[Scaling]:
    kinds: tuple[Any, ...] = ("int8", "fp8", "fnuz", "wide")
    shapes = ((70, 2048), (4096, 4096), (28672, 4096), (4096, 14336))
    for shape, kind, block in itertools.product(shapes, kinds, (None, (128, 128))):
        if kind != "int8" or block is None:
            yield Scaling(shape, kind, block)


@pytest.mark.parametrize("name", TARGETS)
def test_deterministic_sums_have_one_order_for_all_rows(name: str) -> None:
    for scaling in _scalings():
        orders = set()
        for bucket in scaled_config.ROW_BUCKETS:
            config = scaled_config.config_for(TARGETS[name], scaling, bucket, 16, deterministic=True)
            orders.add(tuple(config.blocks[part] for part in ("SPLITS", "BLOCK_N", "BLOCK_K", "PROMOTE")))
        assert len(orders) == 1, f"{scaling} on {name}: {orders}"


@pytest.mark.parametrize("name", TARGETS)
def test_descriptors_are_made_only_of_what_they_can_describe(name: str) -> None:
    """Rows of both operands begin at multiples of 16 bytes, and the target has the unit that reads them."""
    for scaling, bucket in itertools.product(_scalings(), scaled_config.ROW_BUCKETS):
        odd = Scaling((scaling.shape[0], scaling.shape[1] + 8), scaling.kind, scaling.block)
        for other, unit in ((scaling, 1), (odd, 16)):
            config = scaled_config.config_for(TARGETS[name], other, bucket, unit, deterministic=False)
            assert not config.blocks["TMA"]
        if name not in ("sm_90", "sm_100", "sm_120"):
            config = scaled_config.config_for(TARGETS[name], scaling, bucket, 16, deterministic=False)
            assert not config.blocks["TMA"]


def _backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs the last program first."""
    place = interpreter.InterpreterBuilder.set_grid_idx

    def from_the_end(self: Any, *index: int) -> None:
        place(self, *(size - 1 - at for size, at in zip(self.grid_dim, index, strict=True)))

    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", from_the_end)


@pytest.mark.parametrize("name", ["int8, zeros", "fp8, tokens"])
def test_the_order_in_which_splits_arrive_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = _given(16, 4096, 130, **KINDS[name])
    rest = {key: value for key, value in given.items() if key not in ("x_scales", "deterministic")}
    weight, rest = operand_of(**rest)
    launches: list[launch.Launch] = []
    with launch.intercepting(TARGETS["sm_90"], launches.append):
        scaled_matmul(given["x"], given["x_scales"], weight, **rest)
    assert launches[0].constants["SPLITS"] > 1
    first = scaled_matmul(given["x"], given["x_scales"], weight, **rest)
    assert not weight.counters.any(), "the next launch would not find who is the last"
    _backwards(monkeypatch)
    assert torch.equal(scaled_matmul(given["x"], given["x_scales"], weight, **rest), first)
    assert not weight.counters.any()


def test_int8_is_exact_where_float32_is_not() -> None:
    """Sums of 10^8 that differ little from the zero's: float32 would have lost their last bits."""
    torch.manual_seed(0)
    inner = 8192
    codes = torch.randint(100, 128, (64, inner), dtype=INT8)
    zeros = torch.tensor([120, -121, 0], dtype=torch.int32)
    x = (zeros[:, None] + torch.randint(-1, 2, (3, inner))).to(INT8)
    weight = int8_operand(codes, torch.ones(64), has_sums=True)
    y = scaled_matmul(x, torch.ones(3), weight, dtype=torch.float32, zeros=zeros)
    expected = (x.double() - zeros.double()[:, None]) @ codes.double().t()
    assert torch.equal(y, expected.float())


def test_minus_zero_where_it_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED_TARGET", TARGETS["gfx942"])
    every = torch.arange(256, dtype=torch.uint8)
    finite = every[(every & 0x7F) != 0x7F].repeat(4)[:1000]
    codes, x = finite.repeat(16, 1).view(FP8), torch.stack([finite, finite.flip(0)]).view(FP8)
    weight = fp8_operand(codes, torch.full((16, 1), 0.5), (1, 1000), "fnuz")
    assert weight.codes.dtype == torch.float8_e4m3fnuz
    y = scaled_matmul(x, torch.tensor([0.25, 2.0]), weight, dtype=torch.float32)
    expected = (x.double() @ codes.double().t()) * 0.5 * torch.tensor([[0.25], [2.0]]).double()
    assert bool(y.isfinite().all())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-2)


def test_blocks_that_have_a_kernel() -> None:
    assert [block for block in ((1, 300), (128, 128), (64, 256), (64, 64)) if supports_block(block, 512)] == [
        (128, 128),
        (64, 256),
    ]
    assert supports_block((1, 300), 300)
    assert not supports_block((128, 128), 300)


def test_errors() -> None:
    given = _given(2, 256, 64)
    weight = fp8_operand(given["codes"], given["scales"], given["block"], "fp8")
    x, scales, dtype = given["x"], given["x_scales"], torch.bfloat16
    with pytest.raises(KernelError, match="unit stride in K"):
        scaled_matmul(x.view(torch.uint8).repeat(1, 2)[:, ::2].view(FP8), scales, weight, dtype=dtype)
    with pytest.raises(KernelError, match="convert it"):
        scaled_matmul(x.float(), scales, weight, dtype=dtype)
    with pytest.raises(KernelError, match="convert it"):
        scaled_matmul(x[:, :128], scales, weight, dtype=dtype)
    with pytest.raises(KernelError, match="a scale of x for each row"):
        scaled_matmul(x, None, weight, dtype=dtype)
    with pytest.raises(KernelError, match=r"each row \(2\)"):
        scaled_matmul(x, scales.new_ones(3), weight, dtype=dtype)
    with pytest.raises(KernelError, match=r"strided torch\.float32 for torch\.float32"):
        scaled_matmul(x, scales.repeat_interleave(2)[::2], weight, dtype=dtype)
    with pytest.raises(KernelError, match=r"got torch.float16 for torch.float32"):
        scaled_matmul(x, scales.half(), weight, dtype=dtype)
    with pytest.raises(KernelError, match="int8 weights with sums"):
        scaled_matmul(x, scales, weight, dtype=dtype, zeros=torch.zeros(2, dtype=torch.int32))
    with pytest.raises(KernelError, match=r"contiguous bias \(64,\)"):
        scaled_matmul(x, scales, weight, torch.zeros(63), dtype=dtype)
    blocked = _given(2, 256, 64, block=(128, 128))
    weight = fp8_operand(blocked["codes"], blocked["scales"], (128, 128), "fp8")
    with pytest.raises(KernelError, match="a scale of x for each group"):
        scaled_matmul(x, scales, weight, dtype=dtype)


# Machine code.


def _compiled(name: str, target: str) -> str:
    spec = all_kernels()["scaled_matmul"]
    case: Case = next(case for case in spec.signatures if case.name == name)
    (build,) = compile_case(spec, case, TARGETS[target])
    return sass(build) if target.startswith("sm_") else str(build.compiled.asm["amdgcn"])


@pytest.mark.parametrize(
    ("name", "target", "instruction"),
    [
        ("Llama 3 8B, q k v, 1 row", "sm_90", r"\bQGMMA\b"),
        ("int8, 16 rows", "sm_90", r"\bIGMMA\b"),
        ("wide, 16 rows", "sm_90", r"\bHGMMA\b"),
        ("Llama 3 8B, q k v, 1 row", "gfx942", r"v_mfma_f32_\w+_fp8_fp8"),
        ("int8, 16 rows", "gfx942", r"v_mfma_i32_\w+_?i8"),
    ],
)
def test_codes_are_multiplied_as_they_are(name: str, target: str, instruction: str) -> None:
    assert re.search(instruction, _compiled(name, target))


def test_no_register_is_written_while_it_is_multiplied() -> None:
    """Widened weights are an operand in registers."""
    assert overwritten_operands(_compiled("wide, 16 rows", "sm_90")) == []
