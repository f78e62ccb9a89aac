"""Integers of a few bits that checkpoints pack into int32 words."""

import torch


def unpack_words(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """int32 words packed along `dim` (0 or 1), 32 // bits codes each with the first in the low bits: uint8.

    For 2, 4 and 8 bits, of which a whole number fits a word.
    """
    assert 32 % bits == 0, "codes that straddle words are unpack_dense's"
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    shifts = shifts.view(1, -1, 1) if dim == 0 else shifts.view(1, 1, -1)
    codes = (words.unsqueeze(dim + 1) >> shifts) & ((1 << bits) - 1)
    rows, columns = words.shape
    shape = (rows * len(shifts.view(-1)), columns) if dim == 0 else (rows, columns * len(shifts.view(-1)))
    return codes.to(torch.uint8).reshape(shape)


def unpack_dense(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 words [R, ceil(count * bits / 32)] with codes one after the other: uint8 [R, count].

    The low bits come first; a code may lie across two words.
    """
    places = torch.arange(count, dtype=torch.int64) * bits
    word, shift = places // 32, places % 32
    wide = words.long() & 0xFFFFFFFF
    wide = torch.nn.functional.pad(wide, (0, 1))
    low, high = wide[:, word], wide[:, word + 1]
    codes = ((high << 32 | low) >> shift) & ((1 << bits) - 1)
    return codes.to(torch.uint8)
