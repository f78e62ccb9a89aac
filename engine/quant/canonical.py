"""The few kinds of quantized weight that every format is turned into: exact, on the CPU, not yet laid out.

A weight has N rows (outputs) and K columns (inputs). `dequantize` gives what it stands for, in float32; the
tests hold that against the reference of every format, bit for bit. `forms.make_form` lays a weight out for
the device it is to be multiplied on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch


class CanonicalWeight(Protocol):
    """What a format makes of a module's tensors."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        ...

    def dequantize(self) -> torch.Tensor:
        """[N, K] float32."""
        ...

    def joined(self, others: Sequence[Self]) -> Self | None:
        """The rows of all in a row as one weight; None where they differ in more than numbers."""
        ...


@dataclass(frozen=True, slots=True)
class PlainWeight:
    """A weight that is not quantized, beside others of a fused module that are. weight: [N, K], floating."""

    weight: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """See CanonicalWeight."""
        return self.weight.shape[0], self.weight.shape[1]

    def dequantize(self) -> torch.Tensor:
        """See CanonicalWeight."""
        return self.weight.float()

    def joined(self, others: Sequence["PlainWeight"]) -> "PlainWeight | None":
        """See CanonicalWeight."""
        parts = [self.weight, *(other.weight for other in others)]
        if len({part.dtype for part in parts}) > 1:
            return None
        return PlainWeight(torch.cat(parts))


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """WNA16: integer codes with a scale for each group of neighbouring columns; activations stay as they are.

    W[n, k] = (code[n, k] - zero) * scale[n, g] + offset[n, g], in float32, where g = k // group_size; with a
    table, W[n, k] = table[code[n, k]] * scale[n, g].

    codes: [N, K] uint8, less than 2^bits. scales: [N, G], any floating type. zero: one for all codes, or
    [N, G] of whole numbers. offsets: [N, G], None is 0. table: [2^bits] float32, for codes that are not
    evenly spaced (NF4). permutation: [K] int64, None is the order of the columns: column k of the codes is
    column permutation[k] of the weight (act-order).
    """

    codes: torch.Tensor
    bits: int
    group_size: int
    scales: torch.Tensor
    zero: torch.Tensor | int
    offsets: torch.Tensor | None = None
    table: torch.Tensor | None = None
    permutation: torch.Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        assert self.codes.dtype == torch.uint8, "codes are bytes"
        assert columns % self.group_size == 0, "groups are whole"
        groups = (rows, columns // self.group_size)
        for tensor in (self.scales, self.zero, self.offsets):
            assert not isinstance(tensor, torch.Tensor) or tensor.shape == groups, "one for each group"

    @property
    def shape(self) -> tuple[int, int]:
        """See CanonicalWeight."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> torch.Tensor:
        """See CanonicalWeight."""
        grouped = self.codes.view(self.codes.shape[0], -1, self.group_size)
        if self.table is not None:
            values = self.table.float()[grouped.int()]
        else:
            zero = self.zero
            values = grouped.float() - (zero.float()[..., None] if isinstance(zero, torch.Tensor) else zero)
        values = values * self.scales.float()[..., None]
        if self.offsets is not None:
            values = values + self.offsets.float()[..., None]
        values = values.reshape(self.codes.shape)
        if self.permutation is None:
            return values
        return torch.empty_like(values).index_copy_(1, self.permutation, values)

    def joined(self, others: Sequence["GroupedWeight"]) -> "GroupedWeight | None":
        """See CanonicalWeight. A zero of its own for each group is taken where one of them has that."""
        if not all(self._is_like(other) for other in others):
            return None
        parts = (self, *others)
        zeros = [part.zero for part in parts]
        same = all(isinstance(zero, int) and zero == zeros[0] for zero in zeros)
        return replace(
            self,
            codes=torch.cat([part.codes for part in parts]),
            scales=torch.cat([part.scales for part in parts]),
            zero=zeros[0] if same else torch.cat([part.zeros() for part in parts]),
            offsets=None
            if self.offsets is None
            else torch.cat([part.offsets for part in parts if part.offsets is not None]),
        )

    def zeros(self) -> torch.Tensor:
        """The zero of each group, [N, G] float32."""
        if isinstance(self.zero, torch.Tensor):
            return self.zero.float()
        return torch.full(self.scales.shape, float(self.zero))

    def _is_like(self, other: object) -> bool:
        return (
            isinstance(other, GroupedWeight)
            and (self.bits, self.group_size) == (other.bits, other.group_size)
            and self.scales.dtype == other.scales.dtype
            and (self.offsets is None) == (other.offsets is None)
            and _are_equal(self.table, other.table)
            and _are_equal(self.permutation, other.permutation)
        )


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """W8A8: int8 weights with a scale for each row, multiplied with int8 activations.

    W[n, k] = weight[n, k] * scales[n]. Activations are rounded to int8 with a scale for each token, or one
    for all: static_scale, a tensor of one float32. symmetric: False where they have a zero point, each
    token's own or static_zero, in -128..127.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    symmetric: bool = True
    static_scale: torch.Tensor | None = None
    static_zero: int = 0

    def __post_init__(self) -> None:
        assert self.weight.dtype == torch.int8, "weights are int8"
        assert self.scales.shape == self.weight.shape[:1], "a scale for each row"

    @property
    def shape(self) -> tuple[int, int]:
        """See CanonicalWeight."""
        return self.weight.shape[0], self.weight.shape[1]

    def dequantize(self) -> torch.Tensor:
        """See CanonicalWeight."""
        return self.weight.float() * self.scales.float()[:, None]

    def joined(self, others: Sequence["Int8Weight"]) -> "Int8Weight | None":
        """See CanonicalWeight."""
        alike = all(
            isinstance(other, Int8Weight)
            and (self.symmetric, self.static_zero) == (other.symmetric, other.static_zero)
            and _are_equal(self.static_scale, other.static_scale)
            for other in others
        )
        if not alike:
            return None
        parts = (self, *others)
        return replace(
            self,
            weight=torch.cat([part.weight for part in parts]),
            scales=torch.cat([part.scales.float() for part in parts]),
        )


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """FP8: float8_e4m3fn weights with a scale for each block of rows and columns.

    W[n, k] = weight[n, k] * scales[n // block[0], k // block[1]]; scales: [ceil(N / block[0]),
    ceil(K / block[1])] float32. A scale for each row has block (1, K). static_scale: the scale that the
    activations were calibrated with, None where each token has its own; only devices that multiply FP8 with
    FP8 use it.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    block: tuple[int, int]
    static_scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        blocks = tuple(-(-size // of) for size, of in zip(self.weight.shape, self.block, strict=True))
        assert self.weight.dtype == torch.float8_e4m3fn, "weights are float8_e4m3fn"
        assert self.scales.shape == blocks, "a scale for each block"

    @property
    def shape(self) -> tuple[int, int]:
        """See CanonicalWeight."""
        return self.weight.shape[0], self.weight.shape[1]

    def dequantize(self) -> torch.Tensor:
        """See CanonicalWeight."""
        rows, columns = self.shape
        scales = self.scales.float().repeat_interleave(self.block[0], 0)[:rows]
        return self.weight.float() * scales.repeat_interleave(self.block[1], 1)[:, :columns]

    def joined(self, others: Sequence["Fp8Weight"]) -> "Fp8Weight | None":
        """See CanonicalWeight. Blocks of rows must not be cut where two weights meet."""
        parts = (self, *others)
        if not all(isinstance(part, Fp8Weight) for part in others):
            return None
        alike = all(
            self.block == part.block and _are_equal(self.static_scale, part.static_scale) for part in others
        )
        if not alike or any(part.shape[0] % self.block[0] for part in parts[:-1]):
            return None
        return replace(
            self,
            weight=torch.cat([part.weight.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn),
            scales=torch.cat([part.scales.float() for part in parts]),
        )


def join_weights(weights: Sequence[CanonicalWeight]) -> list[CanonicalWeight]:
    """The weights with neighbours of one kind made one; rows stay in their order."""
    joined: list[CanonicalWeight] = []
    pending: list[CanonicalWeight] = []
    for weight in weights:
        if pending and (type(weight) is not type(pending[0]) or pending[0].joined([weight]) is None):
            joined.append(_join(pending))
            pending = []
        pending.append(weight)
    return [*joined, _join(pending)]


def _join(alike: Sequence[CanonicalWeight]) -> CanonicalWeight:
    whole = alike[0] if len(alike) == 1 else alike[0].joined(alike[1:])
    assert whole is not None, "they were found to be alike"
    return whole


def _are_equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and bool(torch.equal(a.float(), b.float()))
