"""Products with integer codes on a CPU, in their three layouts, against float64."""

import warnings
from collections.abc import Callable

import pytest
import torch

from halimede.kernels import matmul_int4
from halimede.kernels.matmul_bytes import bytes_product, pack_bytes, unpack_bytes
from halimede.kernels.matmul_codes import CodedWeight, codes_product, pack_codes
from halimede.kernels.matmul_int4 import block_size, int4_product, int4_rows, pack_int4
from halimede.kernels.recordable import recordable

# Bits, group size; zeros as "middle" of the codes, "each" group's own, "offsets" instead.
KINDS = [
    (4, 32, "middle"),
    (4, 64, "each"),
    (4, 128, "offsets"),
    (4, 96, "each"),
    (2, 32, "middle"),
    (3, 32, "each"),
    (5, 32, "middle"),
    (5, 32, "offsets"),
    (8, 32, "middle"),
    (8, 192, "each"),
    (6, 16, "middle"),
]
ROWS = [1, 3, 16, 17, 33, 70]


def make(bits: int, group: int, zeros: str, shape: tuple[int, int]) -> tuple[tuple, torch.Tensor]:
    """The arguments of the packing functions, and W in float64."""
    generator = torch.Generator().manual_seed(bits * group)
    rows, columns = shape
    groups = (rows, columns // group)
    codes = torch.randint(1 << bits, shape, generator=generator, dtype=torch.uint8)
    # Scales of bfloat16, so that packing rounds none.
    scales = (torch.rand(groups, generator=generator) * 0.1 + 0.01).bfloat16()
    middle = 1 << (bits - 1)
    zero: torch.Tensor | int = middle
    if zeros == "each":
        zero = torch.randint(middle // 2, middle + middle // 2, groups, generator=generator).float()
    offsets = None
    if zeros == "offsets":
        zero, offsets = 0, (-middle * scales.float() * 1.25).bfloat16()
    wide = [
        torch.as_tensor(each).double().expand(groups)
        for each in (scales, zero, 0 if offsets is None else offsets)
    ]
    of_columns = [each.repeat_interleave(group, 1) for each in wide]
    return (scales, zero, offsets), (codes.double() - of_columns[1]) * of_columns[0] + of_columns[2], codes


def shape_of(group: int) -> tuple[int, int]:
    return 75, 384 if 384 % group == 0 else group * 4


@pytest.mark.parametrize(("bits", "group", "zeros"), KINDS)
def test_packed_for_four_bits(bits: int, group: int, zeros: str) -> None:
    if block_size() is None:
        pytest.skip("torch packs in a way of its own on this CPU")
    settings, weight, codes = make(bits, group, zeros, shape_of(group))
    packed = pack_int4(codes, bits, group, *settings)
    assert packed is not None
    for rows in ROWS:
        x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(rows)).bfloat16()
        expected = (x.double() @ weight.t()).float()
        size = float(expected.abs().mean())
        torch.testing.assert_close(
            int4_product(x, packed).float() / size, expected / size, rtol=8e-3, atol=2.5e-2
        )
        wide = int4_product(x.float(), packed)
        torch.testing.assert_close(wide / size, expected / size, rtol=8e-3, atol=1.5e-2)
    ids = torch.tensor([0, 74, 3, 3, 64])
    torch.testing.assert_close(int4_rows(packed, ids), weight[ids].float(), rtol=8e-3, atol=2e-2)


@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 48), (8, 16), (6, 24)])
def test_groups_that_torch_has_no_product_for(bits: int, group: int) -> None:
    settings, _, codes = make(bits, group, "each", (64, 384))
    assert pack_int4(codes, bits, group, *settings) is None


@pytest.mark.parametrize(("bits", "group", "zeros"), [*KINDS, (4, 48, "each"), (7, 3, "offsets")])
def test_unpacked_in_float32(bits: int, group: int, zeros: str) -> None:
    (scales, zero, offsets), weight, codes = make(bits, group, zeros, shape_of(group))
    rows = pack_bytes(codes, scales, zero, offsets)
    coded = CodedWeight(pack_codes(codes, bits), group, scales, zero, offsets, None)
    torch.testing.assert_close(unpack_bytes(rows), weight.float(), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(
        coded.dequantize(torch.tensor([5, 0])), weight[[5, 0]].float(), rtol=1e-6, atol=2e-6
    )
    for count in (1, 3, 33):
        x = torch.randn(count, weight.shape[1], generator=torch.Generator().manual_seed(count))
        expected = (x.double() @ weight.t()).float()
        size = float(expected.abs().mean())
        for product in (bytes_product(x, rows), codes_product(x, coded)):
            torch.testing.assert_close(product / size, expected / size, rtol=1e-5, atol=1e-5)


def test_codes_that_go_through_a_table() -> None:
    generator = torch.Generator().manual_seed(0)
    table, codes = torch.randn(16, generator=generator), torch.randint(16, (40, 64), dtype=torch.uint8)
    scales = torch.rand(40, 2, generator=generator)
    weight = table[codes.int()] * scales.repeat_interleave(32, 1)
    coded = CodedWeight(pack_codes(codes, 4), 32, scales, 0, None, table)
    x = torch.randn(3, 64, generator=generator)
    torch.testing.assert_close(codes_product(x, coded), x @ weight.t(), rtol=1e-5, atol=1e-5)


def test_more_elements_than_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces meet where they should: with tiny ones nothing changes."""
    if block_size() is None:
        pytest.skip("torch packs in a way of its own on this CPU")
    settings, _, codes = make(4, 32, "each", (200, 384))
    x = torch.randn(80, 384, generator=torch.Generator().manual_seed(1))
    whole = pack_int4(codes, 4, 32, *settings)
    assert whole is not None
    y = int4_product(x, whole)
    monkeypatch.setattr(matmul_int4, "_UNPACKED_ELEMENTS", 384 * 64)
    pieces = pack_int4(codes, 4, 32, *settings)
    assert pieces is not None
    assert torch.equal(pieces.packed, whole.packed)
    torch.testing.assert_close(int4_product(x, pieces), y, rtol=1e-6, atol=1e-5)


def _of_int4() -> tuple[Callable[[torch.Tensor], torch.Tensor], int]:
    settings, weight, codes = make(4, 32, "offsets", (64, 384))
    packed = pack_int4(codes, 4, 32, *settings)
    return (lambda x: int4_product(x, packed)), weight.shape[1]  # type: ignore[arg-type]


def _of_bytes() -> tuple[Callable[[torch.Tensor], torch.Tensor], int]:
    settings, weight, codes = make(4, 48, "each", (64, 384))
    rows = pack_bytes(codes, *settings)
    return (lambda x: bytes_product(x, rows)), weight.shape[1]


@pytest.mark.parametrize("make_product", [_of_int4, _of_bytes])
@pytest.mark.parametrize(("recorded", "replayed"), [(2, 9), (20, 80), (80, 20)])
def test_a_recording_serves_other_numbers_of_rows(
    make_product: Callable[[], tuple[Callable[[torch.Tensor], torch.Tensor], int]],
    recorded: int,
    replayed: int,
) -> None:
    """Those of one size class: see LayerTraces."""
    if block_size() is None:
        pytest.skip("torch packs in a way of its own on this CPU")
    product, columns = make_product()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tracing is an old way, and fixes decisions
        traced = torch.jit.trace(product, (torch.randn(recorded, columns),), check_trace=False)
    x = torch.randn(replayed, columns)
    torch.testing.assert_close(traced(x), product(x))


def test_an_operation_is_defined_once() -> None:
    def twice_for_a_test(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    operation = recordable(twice_for_a_test, "Tensor x")
    assert recordable(twice_for_a_test, "Tensor x") is operation
    assert operation(torch.ones(2)).tolist() == [2, 2]
