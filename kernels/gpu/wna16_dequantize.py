"""A weight of integer codes as a plain one of 16 bits: W [N, K], what wna16_matmul.py multiplies with many
rows.

For prompts of thousands of tokens the product is bound by arithmetic, and cuBLAS and hipBLASLt are better
at that than a kernel that decodes the weight again for each 128 rows. W is written once, read once, and
forgotten.

Reads N * K codes and writes 2 * N * K bytes; an operation or two for each weight, which is rounded once.
Rows of a weight that is gate beside up come out as gate above up.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from halimede.errors import KernelError
from halimede.kernels.gpu.wna16_cases import (
    DEQUANTIZE_CASES,
    DEQUANTIZE_SIGNATURES,
    dequantize_reference,
    operand_of,
)
from halimede.kernels.gpu.wna16_decode import record_offsets, records_tile, word_offsets, words_tile
from halimede.kernels.gpu.wna16_layout import Facts, WNA16Operand
from halimede.kernels.gpu.wna16_unit import scaled_unit
from halimede.kernels.launch import Variant, target_of
from halimede.kernels.spec import Fault, KernelSpec, Tensors
from halimede.kernels.target import Target
from halimede.kernels.tuning import KernelConfig, pick_config

_FLOATS = (torch.float16, torch.bfloat16)


@triton.jit
def _wna16_dequantize_kernel(
    words_ptr,
    records_ptr,
    table_ptr,
    weight_ptr,
    SIZE: tl.constexpr,
    INNER: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    GATED: tl.constexpr,
    HIP: tl.constexpr,
    PTX: tl.constexpr,
    WARP_GROUPS: tl.constexpr,
):
    unit = tl.program_id(0)
    row_block = tl.program_id(1) * WARP_GROUPS
    UNITS: tl.constexpr = (INNER + 127) // 128
    WORDS: tl.constexpr = 8 * BITS
    GROUPS: tl.constexpr = 1 if GROUP >= 128 else 128 // GROUP
    KINDS: tl.constexpr = 1 + HAS_ZEROS + HAS_OFFSETS
    RECORD: tl.constexpr = GROUPS * KINDS * (1 if HIP else 2)
    RECORDS: tl.constexpr = INNER // GROUP if GROUP >= 128 else UNITS
    RECORD_STRIDE: tl.constexpr = RECORD * (64 if HIP else 32)
    words_start = words_ptr + (row_block.to(tl.int64) * UNITS + unit) * (64 * WORDS)
    words = tl.load(words_start + word_offsets(UNITS * 64 * WORDS, WARP_GROUPS, WARP_GROUPS, WORDS))
    words = words_tile(words, WARP_GROUPS, WARP_GROUPS, WORDS, HIP)
    record = unit if GROUP <= 128 else unit * 128 // GROUP
    records_start = records_ptr + (row_block * RECORDS + record) * RECORD_STRIDE
    records = tl.load(records_start + record_offsets(RECORDS * RECORD_STRIDE, WARP_GROUPS, RECORD, HIP))
    records = records_tile(records, WARP_GROUPS, GROUPS, KINDS, HIP)
    weight = scaled_unit(
        words,
        records,
        table_ptr,
        BITS,
        GROUP,
        ZERO,
        HAS_ZEROS,
        HAS_OFFSETS,
        weight_ptr.dtype.element_ty,
        HIP,
        PTX,
    )
    stored = row_block * 64 + tl.arange(0, WARP_GROUPS * 64)
    rows = stored
    if GATED:
        rows = stored // 16 * 8 + stored % 8 + stored // 8 % 2 * (SIZE // 2)
    columns = unit * 128 + tl.arange(0, 128)
    is_weight = (stored < SIZE)[:, None]
    if INNER % 128 != 0:
        is_weight = is_weight & (columns < INNER)[None, :]
    tl.store(weight_ptr + rows.to(tl.int64)[:, None] * INNER + columns[None, :], weight, mask=is_weight)


def wna16_dequantize(weight: WNA16Operand, dtype: torch.dtype) -> torch.Tensor:
    """W [N, K] of float16 or bfloat16. KernelError for another dtype, or a weight laid out for another
    device."""
    variant = _variant(
        target_of(weight.words),
        weight.facts,
        weight.records.dtype,
        dtype,
        weight.words.device.type != "cpu",
    )
    plain = weight.records.new_empty(weight.facts.shape, dtype=dtype)
    row_blocks, units = weight.words.shape[:2]
    grid = units, row_blocks // variant.constants["WARP_GROUPS"]
    variant.start(grid, weight.words, weight.records, weight.table, plain)
    return plain


@cache
def _variant(
    target: Target, facts: Facts, records: torch.dtype, dtype: torch.dtype, compiled: bool
) -> Variant:
    """records: the type of the operand's, which is no constant of the kernel. compiled: not interpreted."""
    if dtype not in _FLOATS or facts.backend != target.backend:
        raise KernelError(
            "wna16_dequantize takes float16 or bfloat16 and a weight laid out for "
            f"{target.backend}; they are {dtype} and {facts.backend}; pack the weight for its device"
        )
    config = pick_config(
        "wna16_dequantize",
        target,
        f"{dtype},{records},{facts.key}",
        0,
        lambda: KernelConfig({"WARP_GROUPS": 1}),
    )
    return Variant(
        _wna16_dequantize_kernel,
        config,
        SIZE=facts.shape[0],
        INNER=facts.shape[1],
        BITS=facts.bits,
        GROUP=facts.group_size,
        ZERO=facts.zero,
        HAS_ZEROS=facts.has_zeros,
        HAS_OFFSETS=facts.has_offsets,
        GATED=facts.gated,
        HIP=target.backend == "hip",
        PTX=compiled and target.backend == "cuda",
    )


def _run(dtype: torch.dtype, weight: WNA16Operand | None = None, **canonical: Any) -> Tensors:
    """canonical: what the operand is made of where there is none."""
    return (wna16_dequantize(weight or operand_of(**canonical), dtype),)


SPECS = (
    KernelSpec(
        name="wna16_dequantize",
        summary="a weight of integer codes with group scales as a plain one",
        launcher=_run,
        reference=dequantize_reference,
        tolerance="wna16 dequantize",
        cases=DEQUANTIZE_CASES,
        signatures=DEQUANTIZE_SIGNATURES,
        faults=(
            Fault("stored % 8 + stored // 8 % 2 *", "stored % 8 + stored // 16 % 2 *"),
            Fault("(stored < SIZE)", "(stored < SIZE - 1)"),
            Fault("(columns < INNER)", "(columns < INNER - 1)"),
            Fault("(row_block * RECORDS + record)", "(row_block * RECORDS)"),
            Fault("UNITS + unit) * (64", "UNITS + unit // 2) * (64"),
        ),
    ),
)
