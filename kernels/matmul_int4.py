"""Products with a weight of integer codes on a CPU, by torch's packed 4-bit product: y = x W^T.

W[n, k] = (code[n, k] - zero) * scale[n, g] + offset[n, g], see Int4Weight. torch.ops.aten's
_weight_int4pack_mm_for_cpu multiplies bfloat16 rows with codes of 4 bits in groups of 32, 64, 128 or 256, and
reads a quarter of the bytes that bfloat16 weights have: it is what decoding with one row waits for. Codes of
more bits are two planes of 4, side by side along K, and x is there twice:

    8 bits, u = 16 h + l:   (u - 128) s + c = (l - 8) s + (8 s + c)  +  (h - 8) 16 s
    groups of 16:           u - zero = 16 h + l with h, l in -8..7; 16 low and 16 high codes are one group of
                            32, and the high ones are multiplied with 16 x

The 4-bit product is bound by its instructions from a few rows on. Steps of more than 64 unpack the weight a
piece at a time, into x's type, and multiply with that. Unpacking needs to know torch's layout, which hangs on
the CPU: it is found by packing codes whose places are known.

Layouts: x (M, K), codes [N, K], packed [N / block, K', block / 2] as torch sees fit, scales [K' / g, N, 2].
Scales are bfloat16 in it, so W is as exact as one of bfloat16.
"""

import functools
from dataclasses import dataclass

import torch

from halimede.kernels.norm import FEW_ROWS
from halimede.kernels.recordable import recordable

_MOST_ROWS = 64  # of x, for which codes are multiplied as they are
_FEW_SUMS = 128  # rows of x up to which offsets are a product of their own
_GROUP_SIZES = (256, 128, 64, 32)
_BLOCKS = (64, 32, 16)  # rows of W that torch packs together, on CPUs of different kinds
_ALIGNMENT = 64  # rows of W are filled up to a multiple: torch packs the rest in another way
_LOW = 0x0F0F0F0F0F0F0F0F  # the low four bits of eight bytes
_UNPACKED_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """A weight packed for this CPU. shape: N and K, without filling.

    planes: "one" of codes below 16, "two" of 8 bits, "digits": two interleaved, for groups of 16.
    group_size: of packed columns. has_offsets: whether the second of the scales is anything but 0 (planes
    "one" and "two").
    """

    packed: torch.Tensor
    scales: torch.Tensor
    planes: str
    group_size: int
    shape: tuple[int, int]
    has_offsets: bool


def pack_int4(
    codes: torch.Tensor,
    bits: int,
    group_size: int,
    scales: torch.Tensor,
    zero: torch.Tensor | int,
    offsets: torch.Tensor | None,
) -> Int4Weight | None:
    """Pack codes [N, K] uint8 below 2^bits; scales, zero and offsets as in GroupedWeight.

    None where torch has no product for them: another group size, a CPU or torch without it.
    """
    size = next((size for size in _GROUP_SIZES if group_size % size == 0), None)
    half = 1 << (bits - 1)
    centered = isinstance(zero, int) and zero == half and offsets is None
    digits = group_size == 16 and 4 < bits <= 6 and centered
    if block_size() is None or (size is None and not digits):
        return None
    rows, columns = codes.shape
    if size is None:
        planes, size = "digits", 32
        packed_codes, pairs = _digits(codes, half), _pairs(scales.float(), None)
    else:
        planes = "one" if bits <= 4 else "two"
        constants = half - (zero.float() if isinstance(zero, torch.Tensor) else zero)
        constants = constants * scales.float()
        if offsets is not None:
            constants = constants + offsets.float()
        repeats = group_size // size
        packed_codes, pairs = _planes(
            codes, bits, scales.float().repeat_interleave(repeats, 1), constants.repeat_interleave(repeats, 1)
        )
    filling = -rows % _ALIGNMENT
    return Int4Weight(
        _pack(torch.nn.functional.pad(packed_codes, (0, 0, 0, filling))),
        torch.nn.functional.pad(pairs, (0, 0, 0, filling)),
        planes,
        size,
        (rows, columns),
        not centered,
    )


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """torch's packing of [N, K'] uint8, a piece at a time: it takes codes as int32."""
    step = max(1, _UNPACKED_ELEMENTS // (codes.shape[1] * _ALIGNMENT)) * _ALIGNMENT
    packed = torch.empty(codes.shape[0], codes.shape[1] // 2, dtype=torch.uint8)
    for first in range(0, codes.shape[0], step):
        piece = codes[first : first + step].int()
        packed[first : first + step] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(piece, 2)
    return packed


def _planes(
    codes: torch.Tensor, bits: int, scales: torch.Tensor, constants: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, K] or [N, 2 K] below 16, and their pairs, of a weight (code - 2^(bits - 1)) scale + constant.

    Codes of fewer than 4 or 8 bits are moved to the middle of them, where unpacked ones have their zero.
    """
    half = 1 << (bits - 1)
    if bits <= 4:
        return codes + (8 - half), _pairs(scales, constants)
    moved = codes + (128 - half)
    # (16 h + l - 128) s = (l - 8) s + 8 s + (h - 8) 16 s
    pairs = torch.cat((_pairs(scales, constants + 8 * scales), _pairs(16 * scales, None)))
    return torch.cat((moved & 15, moved >> 4), 1), pairs


def _pairs(scales: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """[N, G] and [N, G] as torch's [G, N, 2] bfloat16."""
    both = torch.stack((scales, torch.zeros_like(scales) if offsets is None else offsets), -1)
    return both.transpose(0, 1).to(torch.bfloat16).contiguous()


def _digits(codes: torch.Tensor, zero: int) -> torch.Tensor:
    """[N, K] to [N, 2 K]: of each 16 codes the low digits, then the high ones; -8..7, stored 8 higher."""
    signed = codes.view(codes.shape[0], -1, 16).to(torch.int16) - zero
    high = (signed + 8) >> 4
    low = signed - 16 * high
    return (torch.cat((low, high), -1) + 8).to(torch.uint8).view(codes.shape[0], -1)


@functools.cache
def block_size() -> int | None:
    """How many rows of a weight torch packs together on this CPU; None where its layout is another."""
    codes = torch.randint(16, (128, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    except (AttributeError, NotImplementedError, RuntimeError):
        return None
    if packed.dtype != torch.uint8 or packed.numel() != codes.numel() // 2:
        return None
    for block in _BLOCKS:
        halves = packed.view(-1, 64, block // 2)
        blocks = torch.cat((halves & 15, halves >> 4), -1)
        if torch.equal(blocks.transpose(1, 2).reshape(128, 64).int(), codes):
            return block
    return None


def int4_product(x: torch.Tensor, weight: Int4Weight) -> torch.Tensor:
    """(M, K) -> (M, N), of x's type. Up to 64 rows of x are rounded to bfloat16."""
    if x.shape[0] <= FEW_ROWS:
        return _packed_product(x, weight)
    product = recordable(product_of_many, _SIGNATURE) if torch._C._is_tracing() else product_of_many
    settings = weight.planes, weight.group_size, weight.shape[0], weight.has_offsets
    return product(x, weight.packed, weight.scales, *settings)


_SIGNATURE = "Tensor x, Tensor packed, Tensor scales, str planes, int group_size, int rows, bool has_offsets"


def product_of_many(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    planes: str,
    group_size: int,
    rows: int,
    has_offsets: bool,
) -> torch.Tensor:
    """int4_product for any number of rows, with the fields of an Int4Weight."""
    weight = Int4Weight(packed, scales, planes, group_size, (rows, x.shape[1]), has_offsets)
    return _packed_product(x, weight) if x.shape[0] <= _MOST_ROWS else _unpacked_product(x, weight)


def _packed_product(x: torch.Tensor, weight: Int4Weight) -> torch.Tensor:
    """By torch's product of codes. What changes nothing is not called, or recordings would call it too."""
    dtype = x.dtype
    if dtype != torch.bfloat16:
        x = x.to(torch.bfloat16)
    if x.shape[0] > 1:  # a single row is
        x = x.contiguous()
    y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        _spread(x, weight.planes), weight.packed, weight.group_size, weight.scales
    )
    if weight.packed.shape[0] != weight.shape[0]:
        y = y[:, : weight.shape[0]]
    return y if y.dtype == dtype else y.to(dtype)


def _spread(x: torch.Tensor, planes: str) -> torch.Tensor:
    """x (M, K) as the packed columns are multiplied with it: (M, K) or (M, 2 K)."""
    if planes == "one":
        return x
    if planes == "two":
        return torch.cat((x, x), 1)
    groups = x.view(x.shape[0], -1, 16)
    return torch.cat((groups, groups * 16), -1).view(x.shape[0], -1)


def _unpacked_product(x: torch.Tensor, weight: Int4Weight) -> torch.Tensor:
    """By pieces of the weight in x's type: never all of it at once."""
    rows, columns = weight.shape
    block = block_size()
    assert block is not None, "a weight was packed"
    count = -(-rows // block)
    y = x.new_empty(x.shape[0], count * block)
    # Offsets are a product of their own with sums of x, or, where x has many rows, a pass over the weight.
    few = x.shape[0] <= _FEW_SUMS
    sums = x.float().view(x.shape[0], -1, weight.group_size).sum(-1) if few and weight.has_offsets else None
    step = max(1, _UNPACKED_ELEMENTS // (columns * block))
    for first in range(0, count, step):
        last = min(count, first + step)
        scales, offsets = _scales_and_offsets(weight, first * block, last * block)
        piece = _unpack_blocks(weight, first, last, scales.to(x.dtype))
        part = y[:, first * block : last * block]
        if sums is not None:
            torch.addmm((sums @ offsets).to(x.dtype), x, piece, out=part)
            continue
        if weight.has_offsets:
            groups = piece.view(len(offsets), -1, piece.shape[1])
            groups += offsets.to(x.dtype)[:, None]
        torch.mm(x, piece, out=part)
    return y if y.shape[1] == rows else y[:, :rows]


def _scales_and_offsets(weight: Int4Weight, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rows first .. last - 1 of W, [G, last - first] float32: of the groups of its columns, the scale of a
    code less its middle, and what is added.
    """
    groups = weight.shape[1] // (16 if weight.planes == "digits" else weight.group_size)
    # A pair of bfloat16 is one word; its halves are the upper halves of float32.
    words = weight.scales.view(torch.int32)[:groups, first:last, 0]
    scales = (words << 16).view(torch.float32)
    offsets = (words & -0x10000).view(torch.float32)
    # With two planes 8 s of what torch adds to the low plane make (l - 8) s an l s.
    return scales, offsets.sub_(8 * scales) if weight.planes == "two" else offsets


def _unpack_blocks(weight: Int4Weight, first: int, last: int, scales: torch.Tensor) -> torch.Tensor:
    """Blocks first .. last - 1 of W^T without offsets: [K, (last - first) * block], of the type of `scales`,
    which _scales_and_offsets gave."""
    columns = weight.shape[1]
    block = block_size()
    assert block is not None, "a weight was packed"
    count = last - first
    packed = weight.packed.view(-1, weight.packed.shape[1] * 2, block // 2)[first:last]
    codes = _centered(packed, weight.planes)  # [count, K, block] int8
    groups = scales.shape[0]
    unpacked = scales.new_empty(groups, columns // groups, count, block)
    torch.mul(
        codes.view(count, groups, -1, block),
        scales.view(groups, 1, count, block).permute(2, 0, 1, 3),
        out=unpacked.permute(2, 0, 1, 3),
    )
    return unpacked.view(columns, count * block)


def _centered(packed: torch.Tensor, planes: str) -> torch.Tensor:
    """Codes less their middle (8 or 128, or what the digits stand for): [count, K, block] int8."""
    count, columns, half = packed.shape
    words = packed.view(torch.int64)
    unpacked = torch.empty(count, columns, 2 * half, dtype=torch.uint8)
    out = unpacked.view(torch.int64)
    width = words.shape[-1]
    torch.bitwise_and(words, _LOW, out=out[..., :width])
    torch.bitwise_and(words >> 4, _LOW, out=out[..., width:])
    if planes == "one":
        return _less(out, 8).view(torch.int8)
    if planes == "two":
        low, high = out[:, : columns // 2], out[:, columns // 2 :]
        return _less((high << 4).bitwise_or_(low), 128).view(torch.int8)
    digits = _less(out, 8).view(torch.int8).view(count, -1, 2, 16, 2 * half)
    return digits[:, :, 1].mul(16).add_(digits[:, :, 0]).view(count, columns // 2, 2 * half)


def _less(words: torch.Tensor, middle: int) -> torch.Tensor:
    """Every byte of the words less the middle, as two's complement, in place."""
    if middle == 128:
        return words.bitwise_xor_(_bytes(0x80))
    return words.bitwise_or_(_bytes(0x80)).sub_(_bytes(middle)).bitwise_xor_(_bytes(0x80))


def _bytes(value: int) -> int:
    """Eight bytes of one value as a signed word."""
    return int.from_bytes(bytes([value]) * 8, "little", signed=True)


def int4_rows(weight: Int4Weight, rows: torch.Tensor) -> torch.Tensor:
    """Rows (T) int64 of W, (T, K) float32."""
    block = block_size()
    assert block is not None, "a weight was packed"
    columns = weight.shape[1]
    packed = weight.packed.view(-1, weight.packed.shape[1] * 2, block // 2)
    place = rows % block
    pairs = packed[rows // block, :, place % (block // 2)]
    codes = torch.where((place >= block // 2)[:, None], pairs >> 4, pairs & 15).to(torch.int8) - 8
    scales = weight.scales[:, rows].float().transpose(0, 1)  # (T, G', 2)
    values = codes.view(len(rows), -1, weight.group_size) * scales[..., :1] + scales[..., 1:]
    if weight.planes == "one":
        return values.view(len(rows), -1)
    if weight.planes == "two":
        return values.view(len(rows), 2, columns).sum(1)
    digits = values.view(len(rows), -1, 2, 16)
    return (digits[:, :, 0] + 16 * digits[:, :, 1]).reshape(len(rows), columns)
