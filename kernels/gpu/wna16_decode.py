"""How the kernel of wna16_matmul.py takes codes and scales out of what wna16_layout.py laid out.

A unit is 64 rows x 128 columns of W. Its codes lie in words of 16 bits, word w of a row holding the columns
w, w + W, w + 2W, ... of the unit, W = 8 * BITS words a row: so the codes at one place of all words are
neighbouring columns, and taking them out is one shift and one mask for two words at once, with nothing to
be moved afterwards. The words of a unit lie in the order of the threads that multiply them, 16 bytes for
each: what a thread loads is what the matrix instruction wants of it.

    cuda: wgmma m64k16 and mma m16k16, a thread of a warp (l / 4, l % 4) has the rows l / 4 + 8 a and the
          columns 16 u + 8 c + 2 (l % 4) + b: order (u, warp, l / 4, l % 4, c, a, b)
    hip:  mfma 16x16x16, a lane (g, row) has the columns 32 t + 16 s + 4 g + i: (t, warp, g, row, s, i)

Scales come in records, one for each pair of rows l / 4, l / 4 + 8 (hip: each row), that hold the unit's
groups; every thread loads those of its rows, so they too are where they are multiplied.
"""

import triton
import triton.language as tl


@triton.jit
def word_offsets(block_stride, BLOCKS: tl.constexpr, WARP_GROUPS: tl.constexpr, WORDS: tl.constexpr):
    """Offsets of the words of one unit of BLOCKS row blocks: [BLOCKS * 64 * WORDS], in load order.

    block_stride: words from one row block to the next. WORDS: of a row of the unit.
    """
    flat = tl.arange(0, BLOCKS * 64 * WORDS)
    inside, chunk = flat % 1024, flat // 1024
    group, rest = chunk % WARP_GROUPS, chunk // WARP_GROUPS
    step, outer = rest % (WORDS // 16), rest // (WORDS // 16)
    block = outer * WARP_GROUPS + group
    return block * block_stride + step * 1024 + inside


@triton.jit
def words_tile(
    words, BLOCKS: tl.constexpr, WARP_GROUPS: tl.constexpr, WORDS: tl.constexpr, HIP: tl.constexpr
):
    """What was loaded at word_offsets as rows of the weight: [BLOCKS * 64, WORDS]."""
    if HIP:
        # row block, t, warp, g, row, s, i
        words = words.reshape(BLOCKS, WORDS // 32, 4, 4, 16, 2, 4).permute(0, 2, 4, 1, 5, 3, 6)
    else:
        # row block / groups, u, group, warp, l / 4, l % 4, c, a, b
        words = words.reshape(BLOCKS // WARP_GROUPS, WORDS // 16, WARP_GROUPS, 4, 8, 4, 2, 2, 2)
        words = words.permute(0, 2, 3, 7, 4, 1, 6, 5, 8)
    return words.reshape(BLOCKS * 64, WORDS)


@triton.jit
def record_offsets(block_stride, BLOCKS: tl.constexpr, RECORD: tl.constexpr, HIP: tl.constexpr):
    """Offsets of the records of BLOCKS row blocks, for each thread its own: in load order.

    block_stride: numbers from one row block to the next. RECORD: numbers of a record.
    """
    THREADS: tl.constexpr = 256 if HIP else 128
    flat = tl.arange(0, BLOCKS * THREADS * RECORD)
    number, thread = flat % RECORD, flat // RECORD % THREADS
    block = flat // (RECORD * THREADS)
    owner = thread // 64 * 16 + thread % 16 if HIP else thread // 4
    return block * block_stride + owner * RECORD + number


@triton.jit
def records_tile(records, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, KINDS: tl.constexpr, HIP: tl.constexpr):
    """What was loaded at record_offsets: [BLOCKS * 64 rows, 4 threads that have the row, GROUPS, KINDS]."""
    if HIP:
        # row block, warp, g, row, group, kind
        records = records.reshape(BLOCKS, 4, 4, 16, GROUPS, KINDS).permute(0, 1, 3, 2, 4, 5)
    else:
        # row block, warp, l / 4, l % 4, group, kind, a
        records = records.reshape(BLOCKS, 4, 8, 4, GROUPS, KINDS, 2).permute(0, 1, 6, 2, 3, 4, 5)
    return records.reshape(BLOCKS * 64, 4, GROUPS, KINDS)


@triton.jit
def pick(tile, INDEX: tl.constexpr):
    """tile[..., INDEX] of a last dimension of 1, 2, 4 or 8."""
    SIZE: tl.constexpr = tile.shape[len(tile.shape) - 1]
    if SIZE == 1:
        found = tile.reshape(tile.shape[:-1])
    elif SIZE == 2:
        found = _half(tile, INDEX)
    elif SIZE == 4:
        found = tile.reshape(tile.shape[:-1] + [2, 2])  # noqa: RUF005
        found = _half(_half(found, INDEX % 2), INDEX // 2)
    else:
        tl.static_assert(SIZE == 8, "one of 1, 2, 4 or 8")
        found = tile.reshape(tile.shape[:-1] + [2, 2, 2])  # noqa: RUF005
        found = _half(found, INDEX % 2)
        found = _half(_half(found, INDEX // 2 % 2), INDEX // 4)
    return found


@triton.jit
def _half(tile, INDEX: tl.constexpr):
    first, second = tile.split()
    return first if INDEX == 0 else second


@triton.jit
def over_words(values, WORDS: tl.constexpr, HIP: tl.constexpr):
    """values [rows, 4 threads, G], a number for each WORDS / G words of a row, over the words: [rows,
    WORDS]."""
    ROWS: tl.constexpr = values.shape[0]
    G: tl.constexpr = values.shape[2]
    values = values.permute(0, 2, 1)
    EACH: tl.constexpr = WORDS // 16 // G  # steps of 16 words that have one number
    if HIP:
        values = values.reshape(ROWS, G, 1, 4, 1).broadcast_to(ROWS, G, EACH, 4, 4)
    else:
        values = values.reshape(ROWS, G, 1, 1, 4, 1).broadcast_to(ROWS, G, EACH, 2, 4, 2)
    return values.reshape(ROWS, WORDS)


@triton.jit
def over_columns(values, BLOCK_M: tl.constexpr):
    """values [rows, 4 threads], over the columns of an accumulator: [rows, BLOCK_M]."""
    ROWS: tl.constexpr = values.shape[0]
    values = values.reshape(ROWS, 1, 4, 1).broadcast_to(ROWS, BLOCK_M // 8, 4, 2)
    return values.reshape(ROWS, BLOCK_M)
