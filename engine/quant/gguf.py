"""GGUF's quantized types that stay quantized: blocks of 32 or 256 columns, each with its scales inside.

A tensor comes as its bytes, uint8 [N, K / block * bytes], rows in Hugging Face's order. All become WNA16:

    Q4_0  d, 16 bytes of codes                      W = d (u - 8)          groups of 32
    Q4_1  d, m, 16 bytes                            W = d u + m            32
    Q5_0  d, 32 high bits, 16 bytes                 W = d (u - 16)         32
    Q5_1  d, m, 32 high bits, 16 bytes              W = d u + m            32
    Q8_0  d, 32 int8                                W = d q                32
    Q4_K  d, dmin, 8 scales and mins of 6 bits, 128 bytes       W = (d sc) u - dmin m     32
    Q5_K  the same, 256 high bits before the codes              W = (d sc) u - dmin m     32
    Q6_K  128 bytes of low bits, 64 of high ones, 16 int8 scales, d     W = (d sc) (u - 32)     16

d, dmin and m are float16. Codes of 4 bits lie with those of the first half of a block (in k-quants: of 64
columns) in the low bits. Source: ggml/src/ggml-common.h and ggml-quants.c of llama.cpp; the oracle of the
tests is gguf.quants.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from halimede.engine.config_fields import ConfigFields
from halimede.engine.quant.canonical import GroupedWeight
from halimede.engine.quant.scheme import ModuleKind
from halimede.engine.quant.stored import StoredModule

_K_SCALES = 12  # bytes of 8 scales and 8 mins of 6 bits


@dataclass(frozen=True, slots=True)
class _Blocks:
    """The fields of N * B blocks. codes: [N, K] uint8; scales, offsets: [N, G]."""

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class BlockType:
    """One type. block, block_bytes: columns and bytes of a block. zero: the code that stands for 0."""

    block: int
    block_bytes: int
    bits: int
    group_size: int
    zero: int
    split: Callable[[torch.Tensor], _Blocks]


def _nibbles(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Bytes [N, B, C] to codes [N, B, 2 C]: of each `width` bytes the low halves, then the high ones."""
    pieces = packed.view(*packed.shape[:2], -1, width)
    return torch.cat((pieces & 15, pieces >> 4), -1).view(*packed.shape[:2], -1)


def _bits(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [N, B, C] to bits [N, B, 8 C], the lowest of a byte first."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((packed[..., None] >> shifts) & 1).flatten(-2)


def _half(field: torch.Tensor) -> torch.Tensor:
    """Two bytes of each block, [N, B, 2], as float16 [N, B]."""
    return field.contiguous().view(torch.float16).squeeze(-1)


def _rows(codes: torch.Tensor) -> torch.Tensor:
    return codes.reshape(codes.shape[0], -1)


def _split_q4_0(b: torch.Tensor) -> _Blocks:
    return _Blocks(_rows(_nibbles(b[..., 2:], 16)), _half(b[..., :2]))


def _split_q4_1(b: torch.Tensor) -> _Blocks:
    return _Blocks(_rows(_nibbles(b[..., 4:], 16)), _half(b[..., :2]), _half(b[..., 2:4]))


def _split_q5_0(b: torch.Tensor) -> _Blocks:
    codes = _nibbles(b[..., 6:], 16) | _bits(b[..., 2:6]) << 4
    return _Blocks(_rows(codes), _half(b[..., :2]))


def _split_q5_1(b: torch.Tensor) -> _Blocks:
    codes = _nibbles(b[..., 8:], 16) | _bits(b[..., 4:8]) << 4
    return _Blocks(_rows(codes), _half(b[..., :2]), _half(b[..., 2:4]))


def _split_q8_0(b: torch.Tensor) -> _Blocks:
    return _Blocks(_rows(b[..., 2:] ^ 0x80), _half(b[..., :2]))  # int8 q to q + 128


def _k_scales(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and offsets of Q4_K and Q5_K: [N, 8 B] float32 each.

    Of the 12 bytes the first 8 have scales 0..3 and mins 0..3 in their low 6 bits and the high 2 bits of
    4..7 above; the last 4 have the low 4 bits of scales 4..7 and of mins 4..7.
    """
    d, dmin = _half(b[..., :2]).float(), _half(b[..., 2:4]).float()
    first, second, rest = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scales = torch.cat((first & 63, (rest & 15) | (first >> 2) & 48), -1)
    mins = torch.cat((second & 63, (rest >> 4) | (second >> 2) & 48), -1)
    return _rows(d[..., None] * scales.float()), _rows(-(dmin[..., None] * mins.float()))


def _split_q4_k(b: torch.Tensor) -> _Blocks:
    return _Blocks(_rows(_nibbles(b[..., 4 + _K_SCALES :], 32)), *_k_scales(b))


def _split_q5_k(b: torch.Tensor) -> _Blocks:
    start = 4 + _K_SCALES
    # Bit j of byte i is the high bit of column 32 j + i.
    shifts = torch.arange(8, dtype=torch.uint8)[:, None]
    high = ((b[..., None, start : start + 32] >> shifts) & 1).flatten(-2)
    return _Blocks(_rows(_nibbles(b[..., start + 32 :], 32) | high << 4), *_k_scales(b))


def _split_q6_k(b: torch.Tensor) -> _Blocks:
    low = _nibbles(b[..., :128], 64)
    # Bits 2 j of byte i in each half: the two high bits of column 32 j + i of that half.
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    halves = b[..., 128:192].reshape(*b.shape[:2], 2, 1, 32)
    high = ((halves >> shifts) & 3).flatten(-3)
    scales = b[..., 192:208].contiguous().view(torch.int8).float() * _half(b[..., 208:]).float()[..., None]
    return _Blocks(_rows(low | high << 4), _rows(scales))


TYPES: Mapping[str, BlockType] = MappingProxyType(
    {
        "Q4_0": BlockType(32, 18, 4, 32, 8, _split_q4_0),
        "Q4_1": BlockType(32, 20, 4, 32, 0, _split_q4_1),
        "Q5_0": BlockType(32, 22, 5, 32, 16, _split_q5_0),
        "Q5_1": BlockType(32, 24, 5, 32, 0, _split_q5_1),
        "Q8_0": BlockType(32, 34, 8, 32, 128, _split_q8_0),
        "Q4_K": BlockType(256, 144, 4, 32, 0, _split_q4_k),
        "Q5_K": BlockType(256, 176, 5, 32, 0, _split_q5_k),
        "Q6_K": BlockType(256, 210, 6, 16, 32, _split_q6_k),
    }
)


@dataclass(frozen=True, slots=True)
class GgufFormat:
    """A weight of one GGUF type."""

    type: str
    required: Sequence[str] = ("weight",)
    optional: Sequence[str] = ()

    def check(self, stored: StoredModule) -> None:
        """See WeightFormat. Scales lie among the codes, so `convert` sees to them."""
        self._bytes(stored)

    def convert(self, stored: StoredModule) -> GroupedWeight:
        """See WeightFormat."""
        kind = TYPES[self.type]
        raw = self._bytes(stored)
        blocks = kind.split(raw.view(raw.shape[0], -1, kind.block_bytes))
        for scales in (blocks.scales, blocks.offsets):
            if scales is not None and not bool(torch.isfinite(scales).all()):
                bad = int((~torch.isfinite(scales)).sum())
                raise stored.error("weight", f"({self.type}) has {bad} scales that are NaN or infinite")
        return GroupedWeight(
            blocks.codes, kind.bits, kind.group_size, blocks.scales, kind.zero, blocks.offsets
        )

    def _bytes(self, stored: StoredModule) -> torch.Tensor:
        kind = TYPES[self.type]
        row = stored.whole_groups(kind.block) * kind.block_bytes
        return stored.get("weight", [(stored.out_features, row)], [torch.uint8])


@dataclass(frozen=True, slots=True)
class GgufScheme:
    """types: of the modules whose weights stay quantized, by their name in the model."""

    types: Mapping[str, str]
    method: str = "gguf"
    kv_cache_scales: bool = False

    def format_of(self, name: str, kind: ModuleKind) -> GgufFormat | None:
        """See QuantScheme."""
        type = self.types.get(name)
        return None if type is None else GgufFormat(type)


def read(fields: ConfigFields) -> GgufScheme:
    """The types that the loader found in the files: {"types": {module: type}}."""
    types = fields.section("types")
    assert types is not None, "a config of a GGUF is made with them"
    return GgufScheme({name: types.text(name) for name in types.names()})
