"""Integers of a few bits that checkpoints pack into int32 words."""

import torch

_PIECE = 1 << 20  # codes that are unpacked at once


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
    codes = torch.empty(words.shape[0], count, dtype=torch.uint8)
    step = max(1, _PIECE // max(count, 1))  # int64 takes tens of bytes for a code
    for first in range(0, words.shape[0], step):
        wide = torch.nn.functional.pad(words[first : first + step].long() & 0xFFFFFFFF, (0, 1))
        both = wide[:, word + 1] << 32 | wide[:, word]
        codes[first : first + step] = (both >> shift) & ((1 << bits) - 1)
    return codes


def pack_words(codes: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """uint8 codes below 2^bits to int32 words along `dim` (0 or 1): unpack_words' reverse.

    The last word is filled up with zeros where the codes are not enough.
    """
    assert 32 % bits == 0, "codes do not straddle words"
    if dim == 0:
        return pack_words(codes.t(), bits, 1).t().contiguous()
    per_word = 32 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word))
    words = torch.zeros(codes.shape[0], padded.shape[1] // per_word, dtype=torch.int32)
    for place in range(per_word):
        words |= padded[:, place::per_word].int() << (bits * place)
    return words
