"""What formats make of a checkpoint's modules as far as it can be known without the checkpoint: kinds, shapes
and types of the canonical weights, with large tensors on the meta device.

Forms made of them launch what those of the real weights do, so that kernels can be built before the weights
are there. What hangs on numbers alone is taken as checkpoints usually have it: activations' scales that are
the same for all parts of a fused module, blocks of 64 in bitsandbytes, scales of AWQ and GPTQ in float16.
"""

import math
from dataclasses import dataclass, replace

import torch

from halimede.engine.loader.quantized import PlainFormat
from halimede.engine.quant import bitsandbytes, mxfp4
from halimede.engine.quant.awq import AwqFormat
from halimede.engine.quant.canonical import (
    CanonicalWeight,
    Fp8Weight,
    GroupedWeight,
    Int8Weight,
    PlainWeight,
)
from halimede.engine.quant.ct_formats import Grouping, IntegerFormat, Mxfp4Format, PackedFormat, W8A8Format
from halimede.engine.quant.fp8 import Fp8Format
from halimede.engine.quant.gguf import TYPES, BlockType, GgufFormat
from halimede.engine.quant.gptq import GptqFormat
from halimede.engine.quant.online import Fp8Online, Int4Online, Int8Online
from halimede.engine.quant.scheme import WeightFormat

_META = torch.device("meta")
_USUAL_BLOCK = 64  # of bitsandbytes' 4 bits; the checkpoint has it
_INT4_BITS, _INT4_MIDDLE = 4, 8


@dataclass(frozen=True, slots=True)
class _Shape:
    """rows, columns: of the weight. dtype: of the model's weights."""

    rows: int
    columns: int
    dtype: torch.dtype

    def empty(self, dtype: torch.dtype, *, per: int | None = None) -> torch.Tensor:
        """[N, K], or with one for each `per` columns."""
        return torch.empty(self.rows, self.columns // (per or 1), dtype=dtype, device=_META)

    def grouped(
        self,
        bits: int,
        size: int | None,
        scales: torch.dtype,
        zero: int | torch.dtype,
        *,
        offsets: torch.dtype | None = None,
        table: torch.Tensor | None = None,
    ) -> GroupedWeight:
        """size: of a group; None, -1 and what does not divide the columns, of which loading will tell, are
        all of them. zero, offsets: a type where each group has one.
        """
        if size is None or size < 1 or self.columns % size:
            size = self.columns
        return GroupedWeight(
            codes=self.empty(torch.uint8),
            bits=bits,
            group_size=size,
            scales=self.empty(scales, per=size),
            zero=zero if isinstance(zero, int) else self.empty(zero, per=size),
            offsets=None if offsets is None else self.empty(offsets, per=size),
            table=table,
        )

    def fp8(self, block: tuple[int, int] | None, *, static: bool = False) -> Fp8Weight:
        """block: None is a row."""
        block = block or (1, self.columns)
        scales = torch.empty(
            -(-self.rows // block[0]), -(-self.columns // block[1]), dtype=torch.float32, device=_META
        )
        return Fp8Weight(self.empty(torch.float8_e4m3fn), scales, block, torch.ones(1) if static else None)

    def int8(self, *, static: bool = False, symmetric: bool = True) -> Int8Weight:
        """See Int8Weight; a static zero is 1."""
        return Int8Weight(
            self.empty(torch.int8),
            torch.empty(self.rows, dtype=torch.float32, device=_META),
            symmetric,
            torch.ones(1) if static else None,
            int(static and not symmetric),
        )


def outlines(format_: WeightFormat, rows: int, columns: int, dtype: torch.dtype) -> list[CanonicalWeight]:
    """Each kind of weight that `convert` may give for a module of rows and columns; small tensors are real.

    dtype: of the model's weights. Nothing for formats that are not known here.
    """
    shape = _Shape(rows, columns, dtype)
    match format_:
        case PlainFormat():
            return [PlainWeight(shape.empty(shape.dtype))]
        case Fp8Online():
            return [shape.fp8(None)]
        case Fp8Format():
            return [shape.fp8(format_.block, static=bool(format_.input_names))]
        case Int8Online():
            return [shape.int8()]
        case W8A8Format():
            return [shape.int8(static=format_.static, symmetric=format_.symmetric_inputs)]
        case _:
            return [*_grouped_outlines(format_, shape)]


def _grouped_outlines(format_: WeightFormat, shape: _Shape) -> list[GroupedWeight]:
    match format_:
        case Int4Online():
            zero = _INT4_MIDDLE if format_.symmetric else torch.uint8
            size = format_.group_of(shape.columns)
            return [shape.grouped(_INT4_BITS, size, torch.bfloat16, zero)]
        case AwqFormat():
            zero = torch.uint8 if format_.has_zeros else _INT4_MIDDLE
            return [shape.grouped(_INT4_BITS, format_.group_size, torch.float16, zero)]
        case GptqFormat():
            # Whether zeros are all one is seen from them alone.
            zeros: tuple[int | torch.dtype, ...] = (1 << format_.bits - 1, torch.uint8)
            both = [shape.grouped(format_.bits, format_.group_size, torch.float16, zero) for zero in zeros]
            return [_permuted(weight) for weight in both] if format_.act_order else both
        case PackedFormat():
            weights = _of_integers(format_.bits, format_.grouping, format_.symmetric, shape)
            has_order = format_.act_order and format_.grouping.group_size is not None
            return [_permuted(weight) for weight in weights] if has_order else weights
        case IntegerFormat():
            return _of_integers(format_.bits, format_.grouping, format_.symmetric, shape)
        case Mxfp4Format() | mxfp4.Mxfp4Format():
            return [shape.grouped(5, mxfp4.GROUP_SIZE, torch.float32, 16)]
        case bitsandbytes.FourBitFormat():
            size = math.gcd(_USUAL_BLOCK, shape.columns)
            return [shape.grouped(4, size, torch.float32, 0, table=torch.linspace(-1, 1, 16))]
        case bitsandbytes.Int8Format():
            return [shape.grouped(8, shape.columns, torch.float32, 128)]
        case GgufFormat():
            return [_of_blocks(TYPES[format_.type], shape)]
        case _:
            return []


def _of_integers(bits: int, grouping: Grouping, symmetric: bool, shape: _Shape) -> list[GroupedWeight]:
    """compressed-tensors': scales have the model's type or, as `halimede quantize` writes them, bfloat16."""
    zero = 1 << bits - 1 if symmetric else torch.uint8
    types = dict.fromkeys((shape.dtype, torch.bfloat16))
    return [shape.grouped(bits, grouping.group_size, scales, zero) for scales in types]


def _of_blocks(kind: BlockType, shape: _Shape) -> GroupedWeight:
    """GGUF's; the type's own block says which numbers it has."""
    block = kind.split(torch.zeros(1, 1, kind.block_bytes, dtype=torch.uint8))
    offsets = None if block.offsets is None else block.offsets.dtype
    return shape.grouped(kind.bits, kind.group_size, block.scales.dtype, kind.zero, offsets=offsets)


def _permuted(weight: GroupedWeight) -> GroupedWeight:
    """With columns in another order, which is not theirs."""
    return replace(weight, permutation=torch.arange(weight.shape[1] - 1, -1, -1))
