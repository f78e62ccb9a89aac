"""Reading tiles of a paged KV cache, for the attention kernels."""

import triton
import triton.language as tl

from halimede.kernels.gpu.float8 import e4m3_to_float16


@triton.jit
def find_row(query_start_loc_ptr, query_block, num_rows, BLOCK_Q: tl.constexpr):
    """The row that a block of query tokens is of: row r has the blocks from start[r] // BLOCK_Q + r on."""
    low = num_rows * 0
    high = num_rows
    while high - low > 1:
        middle = (low + high) // 2
        is_before = tl.load(query_start_loc_ptr + middle) // BLOCK_Q + middle <= query_block
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    return low


@triton.jit
def load_tile(pointers, mask, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """Keys or values in q's dtype, 0 where masked: what lies in an unused slot may be NaN."""
    codes = tl.load(pointers, mask=mask, other=None if mask is None else 0.0)
    if codes.dtype == tl.uint8:
        tile = e4m3_to_float16(codes, NATIVE).to(DTYPE)
    else:
        tile = codes.to(tl.float32).to(DTYPE) if codes.dtype == tl.int8 else codes
    return tile


@triton.jit
def load_blocks(table_ptr, start, last, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The block that the tile of keys from start on lies in, or if blocks are smaller, that of each key."""
    keys = start if BLOCK_SIZE >= BLOCK_N else start + tl.arange(0, BLOCK_N)
    return tl.load(table_ptr + keys // BLOCK_SIZE, mask=keys < last, other=0)
