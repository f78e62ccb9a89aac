"""Products with a weight of integer codes in float32 on a CPU, by FBGEMM's rows of bytes: y = x W^T.

A group of codes is a row of FBGEMM's: its bytes, then a scale and an offset in float32, and
quantized::embedding_bag_byte_unpack makes code * scale + offset of it, as fast as the codes can be read. A
piece of W at a time is unpacked, rounded to x's type and multiplied: W is never there as a whole.

Layouts: x (M, K), rows [N, G, group_size + 8] uint8, y (M, N).
"""

import torch

from halimede.kernels.matmul_codes import multiply_piece, pieces
from halimede.kernels.recordable import recordable


def pack_bytes(
    codes: torch.Tensor, scales: torch.Tensor, zero: torch.Tensor | int, offsets: torch.Tensor | None
) -> torch.Tensor:
    """Rows [N, G, K / G + 8] of codes [N, K] uint8; scales, zero and offsets as in GroupedWeight."""
    s = scales.float()
    o = -(zero.float() if isinstance(zero, torch.Tensor) else zero) * s
    pair = torch.stack((s, o if offsets is None else o + offsets.float()), -1)
    grouped = codes.view(codes.shape[0], s.shape[1], -1)
    return torch.cat((grouped, pair.contiguous().view(torch.uint8)), -1)


def unpack_bytes(rows: torch.Tensor) -> torch.Tensor:
    """Some rows of W: [R, G, group_size + 8] to [R, K] float32."""
    flat = rows.reshape(-1, rows.shape[2])
    unpacked: torch.Tensor = torch.ops.quantized.embedding_bag_byte_unpack(flat)
    return unpacked.view(rows.shape[0], -1)


def bytes_product(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(M, K) -> (M, N), of x's type."""
    if torch._C._is_tracing():
        return recordable(unpacked_bytes_product, "Tensor x, Tensor rows")(x, rows)
    return unpacked_bytes_product(x, rows)


def unpacked_bytes_product(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """See bytes_product."""
    y = x.new_empty(x.shape[0], rows.shape[0])
    for piece in pieces(rows.shape[0], x.shape[1]):
        multiply_piece(x, unpack_bytes(rows[piece]), y[:, piece])
    return y
