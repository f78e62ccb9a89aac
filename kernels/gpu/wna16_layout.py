"""A weight of codes as wna16_matmul.py multiplies it: what is decided and moved once, when it is loaded.

Codes of up to 4 bits take 4, others 8. wna16_decode.py says in which order words and records lie;
docs/kernels.md has a picture. Rows are filled up to whole row blocks of 64 and columns to whole units of
128, with scales of 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from halimede.kernels.matmul_codes import CodedWeight
from halimede.kernels.target import Backend

ROW_BLOCK = 64
UNIT = 128
_THREAD_GROUPS = (16, 32, 64)
"""Group sizes of which several lie in a unit."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What of a weight changes the kernel: its shape [N, K], bits of a stored code, zero of all codes where
    has_zeros is False, which kinds of numbers a group has, whose layout it is.

    gated: whether the rows are two halves, gate and up, eight rows of the one before eight of the other.
    """

    shape: tuple[int, int]
    bits: int
    group_size: int
    zero: int
    has_zeros: bool
    has_offsets: bool
    has_table: bool
    backend: Backend
    gated: bool

    @property
    def key(self) -> str:
        """What a tuned entry is found by, with the types."""
        kinds = "zeros" * self.has_zeros + "offsets" * self.has_offsets + "table" * self.has_table
        words = (
            *self.shape,
            self.bits,
            self.group_size,
            kinds or "plain",
            "gated" if self.gated else "whole",
        )
        return ",".join(map(str, words))

    @property
    def can_scale_sums(self) -> bool:
        """Whether sums of groups can be scaled: a group has the codes at whole places of the words."""
        whole = self.group_size >= min(UNIT, 8 * self.bits)
        return self.backend == "cuda" and whole and not self.has_offsets and not self.has_table


@dataclass(frozen=True, slots=True)
class WNA16Operand:
    """W[n, k] = (code[n, k] - zero) * scale[n, g] + offset[n, g], or table[code[n, k]] * scale[n, g].

    words: [N / 64, K / 128, 64 * 8 * bits] int16, sizes rounded up. records: [N / 64, R, 64 rows * groups
    of a unit * (scale, zero, offset: those that there are)], R: units, or groups where those are larger; of
    a floating type, which is the scales' own. table: [2^bits] float32 or None. counters: [4 N / 64] int32,
    zeros, for launches that split K.
    """

    words: torch.Tensor
    records: torch.Tensor
    table: torch.Tensor | None
    counters: torch.Tensor
    facts: Facts


def supports_groups(group_size: int, columns: int) -> bool:
    """Whether groups of so many columns can be laid out."""
    return group_size in _THREAD_GROUPS or group_size == columns or group_size % UNIT == 0


def pack_wna16(
    codes: torch.Tensor,
    bits: int,
    group_size: int,
    scales: torch.Tensor,
    zero: torch.Tensor | int,
    offsets: torch.Tensor | None,
    table: torch.Tensor | None,
    *,
    backend: Backend,
    gated: bool = False,
) -> WNA16Operand:
    """Lay out codes [N, K] uint8 below 2^bits, scales, zero and offsets [N, G], on whatever device they are.

    supports_groups must hold, and N be a multiple of 16 for gated weights.
    """
    rows, columns = codes.shape
    assert supports_groups(group_size, columns), f"groups of {group_size} have no layout"
    kinds = [scales]
    if isinstance(zero, torch.Tensor):
        kinds.append(zero.to(scales.dtype))
    if offsets is not None:
        kinds.append(offsets.to(scales.dtype))
    if gated:
        codes, kinds = gate_beside_up(codes), [gate_beside_up(kind) for kind in kinds]
    stored_bits = 4 if bits <= 4 else 8
    words = _in_thread_order(_words_of(_padded(codes, UNIT), stored_bits), backend)
    return WNA16Operand(
        words=words,
        records=_records_of(kinds, group_size, words.shape[1], backend),
        table=None if table is None else table.float().contiguous(),
        counters=torch.zeros(4 * words.shape[0], dtype=torch.int32, device=codes.device),
        facts=Facts(
            shape=(rows, columns),
            bits=stored_bits,
            group_size=group_size,
            zero=0 if isinstance(zero, torch.Tensor) else zero,
            has_zeros=isinstance(zero, torch.Tensor),
            has_offsets=offsets is not None,
            has_table=table is not None,
            backend=backend,
            gated=gated,
        ),
    )


def gate_beside_up(rows: torch.Tensor) -> torch.Tensor:
    """[2I, ...], gate's rows before up's, with eight of the one before eight of the other."""
    return rows.view(2, -1, 8, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def _padded(codes: torch.Tensor, unit: int) -> torch.Tensor:
    rows, columns = codes.shape
    whole = -(-rows // ROW_BLOCK) * ROW_BLOCK, -(-columns // unit) * unit
    if whole == (rows, columns):
        return codes
    padded = codes.new_zeros(whole)
    padded[:rows, :columns] = codes
    return padded


def _words_of(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[N, K] to [N, K / 128, 8 * bits]: word w has the columns w, w + 8 * bits, ... of its unit."""
    units = codes.view(codes.shape[0], -1, 16 // bits, 8 * bits)
    words = units[:, :, 0].to(torch.int16)
    for place in range(1, 16 // bits):
        words |= units[:, :, place].to(torch.int16) << (bits * place)
    return words


def _in_thread_order(words: torch.Tensor, backend: Backend) -> torch.Tensor:
    """[N, U, W] to [N / 64, U, 64 * W]: a unit's words as wna16_decode.words_tile takes them."""
    rows, units, width = words.shape
    if backend == "hip":  # warp, row | t, s, g, i
        split = words.view(-1, 4, 16, units, width // 32, 2, 4, 4)
        ordered = split.permute(0, 3, 4, 1, 6, 2, 5, 7)
    else:  # warp, a, l / 4 | u, c, l % 4, b
        split = words.view(-1, 4, 2, 8, units, width // 16, 2, 4, 2)
        ordered = split.permute(0, 4, 5, 1, 3, 7, 6, 2, 8)
    return ordered.reshape(rows // ROW_BLOCK, units, ROW_BLOCK * width).contiguous()


def _records_of(kinds: Sequence[torch.Tensor], group_size: int, units: int, backend: Backend) -> torch.Tensor:
    """[N, G] of each kind to [N / 64, R, 64 * groups of a unit * kinds], as wna16_decode.records_tile takes
    them."""
    groups = UNIT // group_size if group_size in _THREAD_GROUPS else 1
    count = units * groups if groups > 1 else kinds[0].shape[1]
    rows = -(-kinds[0].shape[0] // ROW_BLOCK) * ROW_BLOCK
    filled = kinds[0].new_zeros(rows, count, len(kinds))
    for number, kind in enumerate(kinds):
        filled[: kind.shape[0], : kind.shape[1], number] = kind
    if backend == "hip":
        ordered = filled.view(-1, ROW_BLOCK, count // groups, groups, len(kinds)).permute(0, 2, 1, 3, 4)
    else:  # warp, a, l / 4 | group, kind
        split = filled.view(-1, 4, 2, 8, count // groups, groups, len(kinds))
        ordered = split.permute(0, 4, 1, 3, 5, 6, 2)
    shape = rows // ROW_BLOCK, count // groups, ROW_BLOCK * groups * len(kinds)
    return ordered.reshape(shape).contiguous()  # a view, if only one of them is more than 1


def gated_operand(weight: WNA16Operand) -> WNA16Operand:
    """The same weight, whose rows are gate's above up's, with eight rows of the one before eight of the
    other.

    gate and up must each have a multiple of 8 rows.
    """
    size = weight.facts.shape[0]
    assert not weight.facts.gated, "its rows are in pairs already"
    assert size % 16 == 0, "gate and up are whole eights of rows"
    words, records = _words_by_eights(weight), _records_by_eights(weight)
    eights = torch.arange(words.rows.shape[0], device=weight.words.device)
    eights[: size // 8] = eights[: size // 8].view(2, -1).t().reshape(-1)
    return replace(
        weight,
        words=words.put_back(words.rows[eights]),
        records=records.put_back(records.rows[eights]),
        facts=replace(weight.facts, gated=True),
    )


def rows_of(weight: WNA16Operand, ids: torch.Tensor) -> torch.Tensor:
    """Rows (T) of W, not gated, for embeddings: (T, K) float32, by torch's operations."""
    facts = weight.facts
    eight, row = ids // 8, ids % 8
    words = _words_by_eights(weight).rows[eight, row].to(torch.int32) & 0xFFFF
    places = [(words >> (facts.bits * place)) & ((1 << facts.bits) - 1) for place in range(16 // facts.bits)]
    codes = torch.stack(places, 2).reshape(len(ids), -1)[:, : facts.shape[1]]
    numbers = _records_by_eights(weight).rows[eight, row]
    groups = numbers.reshape(len(ids), -1, numbers.shape[-1])[:, : facts.shape[1] // facts.group_size].float()
    coded = CodedWeight(
        codes,
        facts.group_size,
        scales=groups[..., 0],
        zeros=groups[..., 1] if facts.has_zeros else facts.zero,
        offsets=groups[..., -1] if facts.has_offsets else None,
        table=weight.table,
    )
    return coded.dequantize(slice(None))


@dataclass(frozen=True, slots=True)
class _ByEights:
    """A tensor of an operand by rows of W: rows is [N / 8, 8, ...], in the order of the columns."""

    rows: torch.Tensor
    order: tuple[int, ...]
    view: tuple[int, ...]
    shape: torch.Size

    def put_back(self, rows: torch.Tensor) -> torch.Tensor:
        """As it lies in the operand."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        moved = rows.reshape([self.view[dim] for dim in self.order])
        return moved.permute(inverse).reshape(self.shape).contiguous()


def _words_by_eights(weight: WNA16Operand) -> _ByEights:
    """rows: [N / 8, 8, K / 128, words of a unit]."""
    blocks, units = weight.words.shape[:2]
    width = 8 * weight.facts.bits
    if weight.facts.backend == "hip":  # block, unit, t, warp, g, a, row, s, i
        view = (blocks, units, width // 32, 4, 4, 2, 8, 2, 4)
        order = (0, 3, 5, 6, 1, 2, 7, 4, 8)
    else:  # block, unit, u, warp, l / 4, l % 4, c, a, b
        view = (blocks, units, width // 16, 4, 8, 4, 2, 2, 2)
        order = (0, 3, 7, 4, 1, 2, 6, 5, 8)
    rows = weight.words.view(view).permute(order).reshape(blocks * 8, 8, units, width)
    return _ByEights(rows, order, view, weight.words.shape)


def _records_by_eights(weight: WNA16Operand) -> _ByEights:
    """rows: [N / 8, 8, R, groups of a unit, kinds]."""
    blocks, records = weight.records.shape[:2]
    facts = weight.facts
    kinds = 1 + facts.has_zeros + facts.has_offsets
    groups = weight.records.shape[2] // (ROW_BLOCK * kinds)
    if facts.backend == "hip":  # block, record, warp, a, row, group, kind
        view, order = (blocks, records, 4, 2, 8, groups, kinds), (0, 2, 3, 4, 1, 5, 6)
    else:  # block, record, warp, l / 4, group, kind, a
        view, order = (blocks, records, 4, 8, groups, kinds, 2), (0, 2, 6, 3, 1, 4, 5)
    rows = weight.records.view(view).permute(order).reshape(blocks * 8, 8, records, groups, kinds)
    return _ByEights(rows, order, view, weight.records.shape)
