"""Products with a weight of integer codes by torch's operations, on any device: y = x W^T.

W[n, k] = (code[n, k] - zero) * scale[n, g] + offset[n, g], or table[code[n, k]] * scale[n, g], where
g = k // group_size. A piece of W at a time is computed in float32, rounded to x's type and multiplied: W is
never there as a whole. It is right for every code, and as slow as its dozen operations over each weight;
matmul_int4.py is what a CPU uses where it can.

Layouts: x (M, K), codes [N, K] uint8, or [N, K / 2] of two codes below 16 with the even column in the low
bits; scales, zeros, offsets [N, G].
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from halimede.kernels.matmul import plain_products
from halimede.kernels.recordable import recordable

_PIECE = 1 << 20  # elements of W at once


@dataclass(frozen=True, slots=True)
class CodedWeight:
    """A weight of codes. zeros: one for all, or [N, G]. offsets, table: None where there is none."""

    codes: torch.Tensor
    group_size: int
    scales: torch.Tensor
    zeros: torch.Tensor | int
    offsets: torch.Tensor | None
    table: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.codes.shape[0], self.scales.shape[1] * self.group_size

    def dequantize(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Some rows of W: (R, K) float32."""
        codes, columns = self.codes[rows], self.shape[1]
        if codes.shape[1] != columns:
            codes = torch.stack((codes & 15, codes >> 4), -1)
        codes = codes.reshape(-1, columns // self.group_size, self.group_size)
        values = codes.float() if self.table is None else self.table[codes.int()]
        if self.table is None:
            zeros = self.zeros
            values -= zeros[rows].float()[..., None] if isinstance(zeros, torch.Tensor) else zeros
        values *= self.scales[rows].float()[..., None]
        if self.offsets is not None:
            values += self.offsets[rows].float()[..., None]
        return values.view(-1, columns)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [N, K] uint8 below 2^bits as a CodedWeight holds them: two in a byte where they fit."""
    if bits > 4 or codes.shape[1] % 2:
        return codes.contiguous()
    return codes[:, ::2] | codes[:, 1::2] << 4


def codes_product(x: torch.Tensor, weight: CodedWeight) -> torch.Tensor:
    """(M, K) -> (M, N), of x's type."""
    zeros = weight.zeros
    zero, tensor = (0, zeros) if isinstance(zeros, torch.Tensor) else (zeros, None)
    product = recordable(decoded_product, _SIGNATURE) if torch._C._is_tracing() else decoded_product
    return product(
        x, weight.codes, weight.group_size, weight.scales, zero, tensor, weight.offsets, weight.table
    )


_SIGNATURE = (
    "Tensor x, Tensor codes, int group_size, Tensor scales, int zero, Tensor? zeros, Tensor? offsets, "
    "Tensor? table"
)


def decoded_product(
    x: torch.Tensor,
    codes: torch.Tensor,
    group_size: int,
    scales: torch.Tensor,
    zero: int,
    zeros: torch.Tensor | None,
    offsets: torch.Tensor | None,
    table: torch.Tensor | None,
) -> torch.Tensor:
    """See codes_product."""
    weight = CodedWeight(codes, group_size, scales, zero if zeros is None else zeros, offsets, table)
    y = x.new_empty(x.shape[0], weight.shape[0])
    for rows in pieces(*weight.shape):
        multiply_piece(x, weight.dequantize(rows), y[:, rows])
    return y


def pieces(rows: int, columns: int) -> Iterator[slice]:
    """Rows of a weight [rows, columns] that are computed at once."""
    step = max(1, _PIECE // max(columns, 1))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def multiply_piece(x: torch.Tensor, piece: torch.Tensor, out: torch.Tensor) -> None:
    """out (M, R) = x (M, K) times rows (R, K) of a weight, rounded to x's type."""
    piece = piece.to(x.dtype)
    if x.device.type == "cpu" and x.shape[0] == 1:
        with plain_products():  # see matmul.py
            torch.mv(piece, x[0], out=out[0])
    else:
        torch.mm(x, piece.t(), out=out)
