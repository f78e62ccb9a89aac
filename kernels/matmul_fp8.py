"""Products with a weight of float8_e4m3fn by torch's operations: y = x W^T, W[n, k] = weight[n, k] * scale.

A piece of W at a time is widened and multiplied, in x's type; scales of rows are left to y. On a CPU torch's
conversion from float8 takes six times as long as what stands here: the bits of e4m3 are moved to where
bfloat16 has them, and 2^120 makes up for the difference in bias. Numbers too small for a normal e4m3 come out
right too.

Layouts: x (M, K), weight [N, K] float8_e4m3fn, scales [ceil(N / block[0]), ceil(K / block[1])] float32,
y (M, N).
"""

import torch

from halimede.kernels.matmul_codes import multiply_piece, pieces
from halimede.kernels.recordable import recordable

_BIAS = 2.0**120  # bfloat16's exponent bias less e4m3's


def widen_fp8(weight: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn to bfloat16, exactly; NaN becomes 480."""
    if weight.device.type != "cpu":
        return weight.to(torch.bfloat16)
    moved = weight.view(torch.int8).to(torch.int16).bitwise_left_shift_(4).bitwise_and_(-0x7810)
    return moved.view(torch.bfloat16).mul_(_BIAS)


def dequantize_fp8(
    weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], rows: slice | torch.Tensor
) -> torch.Tensor:
    """Some rows of W: (R, K) float32."""
    chosen = widen_fp8(weight[rows]).float()
    of_rows = scales[_blocks_of(rows, block[0], weight.shape[0], scales.device)]
    if of_rows.shape[1] == 1:
        return chosen.mul_(of_rows)
    columns = weight.shape[1]
    return chosen.mul_(of_rows.repeat_interleave(block[1], 1)[:, :columns])


def _blocks_of(rows: slice | torch.Tensor, height: int, count: int, device: torch.device) -> torch.Tensor:
    """The block that each of the rows is in."""
    if isinstance(rows, slice):
        return torch.arange(*rows.indices(count), device=device) // height
    return rows // height


def fp8_product(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]
) -> torch.Tensor:
    """(M, K) -> (M, N), of x's type."""
    product = recordable(widened_product, _SIGNATURE) if torch._C._is_tracing() else widened_product
    return product(x, weight, scales, *block)


_SIGNATURE = "Tensor x, Tensor weight, Tensor scales, int block_rows, int block_columns"


def widened_product(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, block_rows: int, block_columns: int
) -> torch.Tensor:
    """See fp8_product."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    block = block_rows, block_columns
    by_row = scales.shape[1] == 1 and x.dtype != torch.float16  # whose sums of numbers up to 448 overflow
    for rows in pieces(*weight.shape):
        piece = widen_fp8(weight[rows]) if by_row else dequantize_fp8(weight, scales, block, rows)
        multiply_piece(x, piece, y[:, rows])
    if not by_row:
        return y
    # A scale for each row of W is one for each column of y: three passes over the weight less.
    of_rows = scales.squeeze(1).repeat_interleave(block_rows)[: weight.shape[0]]
    return y.float().mul_(of_rows).to(x.dtype)
