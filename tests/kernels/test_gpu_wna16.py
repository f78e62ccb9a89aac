"""The product with a weight of integer codes: every group size and kind of zero, layouts, machine code."""

import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tolerances import assert_kernel_close

from halimede.errors import KernelError
from halimede.kernels import launch
from halimede.kernels.compile import compile_case
from halimede.kernels.gpu import wna16_cases, wna16_config
from halimede.kernels.gpu.wna16_cases import operand_of, plain_weight, reference
from halimede.kernels.gpu.wna16_dequantize import wna16_dequantize
from halimede.kernels.gpu.wna16_layout import gated_operand, rows_of, supports_groups
from halimede.kernels.gpu.wna16_matmul import wna16_matmul
from halimede.kernels.inspect import sass
from halimede.kernels.matmul_wna16 import wna16_product
from halimede.kernels.spec import Case, all_kernels
from halimede.kernels.target import TARGETS
from halimede.kernels.warp_group_hazards import overwritten_operands

ROWS = (1, 3, 16, 17, 64, 130)
KINDS = ("", "zeros", "offsets", "table")
CPU = torch.device("cpu")


def _combinations() -> Iterator[Any]:
    """Every group size with every kind of zero and both widths; rows and types in turn."""
    turn = itertools.cycle(itertools.product((torch.bfloat16, torch.float16), ROWS))
    for bits, group, kinds in itertools.product((4, 8), (16, 32, 64, 128, "row"), KINDS):
        if bits == 8 and kinds == "table":
            continue
        dtype, rows = next(turn)
        yield pytest.param(rows, bits, group, kinds, dtype, id=f"{bits}-{group}-{kinds or 'plain'}-{rows}")


def _canonical(
    size: int,
    inner: int,
    bits: int = 4,
    group: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    kinds: str = "",
) -> dict[str, Any]:
    torch.manual_seed(size * inner + bits + group)
    return wna16_cases._canonical(size, inner, bits, group, dtype, kinds, CPU)


@pytest.fixture(params=["sm_90", "gfx942"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The interpreter makes this target's choices, and weights are laid out for it."""
    monkeypatch.setattr(launch, "INTERPRETED_TARGET", TARGETS[request.param])
    return TARGETS[request.param].backend


@pytest.mark.parametrize(("rows", "bits", "group", "kinds", "dtype"), list(_combinations()))
def test_every_group_and_zero(
    rows: int, bits: int, group: int | str, kinds: str, dtype: torch.dtype, backend: str
) -> None:
    inner = 208 if group in (16, "row") else {32: 160, 64: 192, 128: 256}[int(group)]
    canonical = _canonical(75, inner, bits, inner if group == "row" else int(group), dtype, kinds)
    x = torch.randn(rows, inner).to(dtype)
    operand = operand_of(**canonical)
    assert operand.facts.backend == backend
    (expected,) = reference(x, None, None, False, **canonical)
    assert_kernel_close(wna16_matmul(x, operand), expected, "wna16 matmul")


@pytest.mark.parametrize(
    ("size", "inner", "bits", "group", "kinds"),
    [
        (128, 256, 4, 128, ""),
        (80, 320, 4, 32, "zeros"),
        (64, 208, 8, 16, "offsets"),
        (48, 200, 6, 200, "zeros"),
        (64, 256, 4, 64, "table"),
        (64, 512, 4, 256, ""),
    ],
)
def test_layouts(size: int, inner: int, bits: int, group: int, kinds: str, backend: str) -> None:
    canonical = _canonical(size, inner, bits, group, torch.float32, kinds)
    operand, plain = operand_of(**canonical), plain_weight(**canonical)
    ids = torch.tensor([0, 5, size - 1, 17, 5])
    torch.testing.assert_close(rows_of(operand, ids).double(), plain[ids], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        wna16_dequantize(operand, torch.float16), plain.to(torch.float16), rtol=1e-3, atol=1e-6
    )
    gated, expected = gated_operand(operand), operand_of(**canonical, gated=True)
    assert torch.equal(gated.words, expected.words)
    assert torch.equal(gated.records, expected.records)
    assert gated.facts == expected.facts
    assert operand.words.nbytes == -(-size // 64) * 64 * -(-inner // 128) * 128 * (4 if bits <= 4 else 8) // 8


def test_groups_that_have_no_layout() -> None:
    assert [group for group in (8, 16, 32, 64, 96, 128, 192, 256, 576) if supports_groups(group, 576)] == [
        16, 32, 64, 128, 256, 576,
    ]  # fmt: skip


def test_a_row_alone_is_as_among_others() -> None:
    canonical = _canonical(64, 2048)
    operand = operand_of(**canonical)
    x = torch.randn(130, 2048).to(torch.bfloat16)
    together = wna16_matmul(x, operand, deterministic=True)
    for rows in (slice(0, 1), slice(3, 20), slice(64, 130)):
        assert torch.equal(wna16_matmul(x[rows], operand, deterministic=True), together[rows])


def test_counters_are_zero_after_a_split_product() -> None:
    operand = operand_of(**_canonical(64, 2048))
    x = torch.randn(3, 2048).to(torch.bfloat16)
    first = wna16_matmul(x, operand)
    assert not operand.counters.any()
    assert torch.equal(wna16_matmul(x, operand), first)


def test_many_rows_are_multiplied_with_the_plain_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    from halimede.kernels import matmul_wna16

    monkeypatch.setattr(matmul_wna16, "DEQUANTIZE_ROWS", 2)
    canonical = _canonical(96, 256)
    x = torch.randn(5, 256).to(torch.bfloat16)
    (expected,) = reference(x, None, None, False, **canonical)
    assert_kernel_close(wna16_product(x, operand_of(**canonical)), expected, "wna16 matmul")
    (expected,) = reference(x, None, "silu", False, **canonical)
    bias = torch.randn(96).to(torch.bfloat16)
    (with_bias,) = reference(x, bias, None, False, **canonical)
    assert_kernel_close(wna16_product(x, operand_of(**canonical), bias), with_bias, "wna16 matmul")
    gated = wna16_product(x, operand_of(**canonical, gated=True), activation="silu")
    torch.testing.assert_close(gated, expected, rtol=2e-2, atol=1e-2)  # gate and up are rounded on the way


def test_errors() -> None:
    operand = operand_of(**_canonical(64, 256))
    x = torch.randn(2, 256).to(torch.bfloat16)
    with pytest.raises(KernelError, match=r"x \(M, 256\) of float16 or bfloat16"):
        wna16_matmul(x[:, :128], operand)
    with pytest.raises(KernelError, match="float32"):
        wna16_matmul(x.float(), operand)
    with pytest.raises(KernelError, match="unit stride"):
        wna16_matmul(x.repeat(1, 2)[:, ::2], operand)
    with pytest.raises(KernelError, match="activation 'silu' does not suit"):
        wna16_matmul(x, operand, activation="silu")
    with pytest.raises(KernelError, match=r"contiguous bias \(64,\)"):
        wna16_matmul(x, operand, torch.zeros(63))
    with pytest.raises(KernelError, match="float16 or bfloat16"):
        wna16_dequantize(operand, torch.float32)


def test_a_weight_of_another_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    operand = operand_of(**_canonical(64, 256))
    monkeypatch.setattr(launch, "INTERPRETED_TARGET", TARGETS["gfx942"])
    with pytest.raises(KernelError, match="laid out for cuda, not for gfx942"):
        wna16_matmul(torch.randn(2, 256).to(torch.bfloat16), operand)


# Machine code.

INSTRUCTIONS_PER_BYTE = 7.2
"""Of a thread, for each byte of codes, in the loop of few rows: sm_90 5.8 (Triton 3.6) and 6.3 (3.9), sm_80
6.8 and 5.7. An H100 executes some 9 while its memory brings a byte."""


def _compiled(name: str, target: str) -> str:
    spec = all_kernels()["wna16_matmul"]
    case: Case = next(case for case in spec.signatures if case.name == name)
    (build,) = compile_case(spec, case, TARGETS[target])
    return sass(build)


def _loop(code: str) -> list[str]:
    """Instructions of the loop that multiplies."""
    lines = code.splitlines()
    labels = {match[1]: at for at, line in enumerate(lines) if (match := re.match(r"\s*(\.L_x_\d+):", line))}
    for at, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*(\.L_x_\d+)", line)
        if target and labels.get(target[1], at) < at:
            body = [
                line for line in lines[labels[target[1]] : at] if re.match(r"\s*/\*[0-9a-f]{4,}\*/", line)
            ]
            if any("MMA" in line for line in body):
                return body
    raise AssertionError("no loop has a product")


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_few_rows_load_16_bytes_and_need_few_instructions(target: str) -> None:
    loop = _loop(_compiled("Llama 3 8B, q k v, 1 row", target))
    copies = [line for line in loop if "LDGSTS" in line]
    # Two of a unit's 4 KB of codes for each of 128 threads, four of x's; the rest are scales.
    assert sum(".128" in line for line in copies) >= 2
    assert not any(re.search(r"\b(STL|LDL|STS|SHFL)\b", line) for line in loop), (
        "nothing is moved between threads"
    )
    assert len(loop) * 128 / 4096 <= INSTRUCTIONS_PER_BYTE
    assert any(("HGMMA" if target == "sm_90" else "HMMA") in line for line in loop)


@pytest.mark.parametrize("name", [case.name for case in all_kernels()["wna16_matmul"].signatures])
def test_no_register_is_written_while_it_is_multiplied(name: str) -> None:
    assert overwritten_operands(_compiled(name, "sm_90")) == []


def test_the_widest_blocks_have_no_such_register_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are scaled, and sums that go through the loop: what Triton would let run on."""
    case = wna16_cases._case("1024 rows", 1024, 4096, 4096, laid_out=True)
    (build,) = compile_case(all_kernels()["wna16_matmul"], case, TARGETS["sm_90"])
    assert build.config.blocks["BLOCK_M"] == 256
    assert overwritten_operands(sass(build)) == []


RUNNING_ON = """
.L_x_1:
        /*0100*/                   LOP3.LUT R61, R11, 0xf000f, R85, 0xea, !PT ;
        /*0110*/                   HGMMA.64x64x16.F32.BF16 R24, R76, gdesc[UR12], R24, gsb0 ;
        /*0120*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0130*/                   HGMMA.64x64x16.F32.BF16 R24, R60, gdesc[UR12], R24, gsb0 ;
        /*0140*/                   WARPGROUP.DEPBAR.LE gsb0, {kept} ;
        /*0150*/              @!P4 BRA `(.L_x_1) ;
"""


@pytest.mark.parametrize(("kept", "found"), [("0x1", 1), ("0x0", 0)])
def test_a_product_that_runs_on_is_noticed(kept: str, found: int) -> None:
    hazards = overwritten_operands(RUNNING_ON.format(kept=kept))
    assert len(hazards) == found
    assert all("LOP3.LUT R61" in hazard for hazard in hazards)


def test_every_number_of_rows_has_a_bucket() -> None:
    assert wna16_config.ROW_BUCKETS[-1] > 1 << 20
