"""Product with a weight of integer codes that have scales for groups of columns; activations stay 16 bits.

    y[m, n] = sum_k x[m, k] W[n, k] + bias[n],   W[n, k] = (code - zero) * scale + offset, or table[code] *
    scale

or, of a weight that is gate and up of a gated feed-forward layer, act(gate) * up of them. Layouts: x (M, K),
unit stride in K; the weight a WNA16Operand (wna16_layout.py); y (M, N) contiguous, of x's type, rounded once.

Reads N * K codes once per block of rows of x, with few rows once, and moves M * (K + N) elements beside;
2 * M * N * K FLOPs. Up to about 64 rows the time is that of reading the weight.

The weight is the first operand of the matrix instructions and stays in registers: Hopper's take only that
one from there, want 64 rows of it, and are content with 8 columns of the other, the batch. So one kernel
serves 1 and 4096 rows, with other blocks. A tile goes from memory to the threads in 16 bytes each, in the
order in which they multiply it, without a shuffle; codes become floats by a mask, for two at a time.

Few rows (SCALE_SUMS): codes less their zeros are multiplied as they are, exactly, and each group's sum is
scaled in float32: fewer instructions for a byte of codes than scaling every weight, and no rounding of
weights. Many rows, small groups, offsets and tables: weights are scaled, and rounded to 16 bits as a
dequantized weight would be.

K is split over programs where N alone does not fill the processors: always into the same pieces for a
weight and a number of rows in the same bucket, summed in order by the last program to arrive
(split_k.py), so results have the same bits at every run. With deterministic=True pieces and scaling do
not depend on the rows either.
"""

from functools import cache
from typing import Any, Literal, get_args

import torch
import triton
import triton.language as tl

from halimede.errors import KernelError
from halimede.kernels.gpu.activation import _activated
from halimede.kernels.gpu.rows import check_bias, product_rows, row_bucket
from halimede.kernels.gpu.split_k import fence_threads, leave_partial, split_workspace, sum_partials
from halimede.kernels.gpu.wna16_cases import CASES, SIGNATURES, case_of, facts_of, operand_of, reference
from halimede.kernels.gpu.wna16_config import ROW_BUCKETS, candidates, config_for
from halimede.kernels.gpu.wna16_decode import (
    over_columns,
    pick,
    record_offsets,
    records_tile,
    word_offsets,
    words_tile,
)
from halimede.kernels.gpu.wna16_layout import Facts, WNA16Operand
from halimede.kernels.gpu.wna16_unit import codes_of_part, finished, scaled_unit
from halimede.kernels.launch import Launch, Variant, target_of
from halimede.kernels.spec import Fault, KernelSpec, Tensors, TuningSpace
from halimede.kernels.target import Target
from halimede.kernels.tuning import KernelConfig, pick_config
from halimede.kernels.variant_key import Layout, layout

GatedActivation = Literal["silu", "gelu_tanh"]
_ACTIVATIONS = get_args(GatedActivation)
_FLOATS = (torch.float16, torch.bfloat16)


@triton.jit(do_not_specialize=["num_rows", "x_stride"])
def _wna16_matmul_kernel(
    x_ptr,
    words_ptr,
    records_ptr,
    table_ptr,
    bias_ptr,
    y_ptr,
    partials_ptr,
    counters_ptr,
    num_rows,
    x_stride,
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    INNER: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HIP: tl.constexpr,
    PTX: tl.constexpr,
    FENCE_THREADS: tl.constexpr,
    SCALE_SUMS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WARP_GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Blocks of rows are neighbours in the grid: those of the same weight run at about the same time.
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    row_block = tl.program_id(1) * (BLOCK_N // 64)
    split = tl.program_id(2)
    BLOCKS: tl.constexpr = BLOCK_N // 64
    UNITS: tl.constexpr = (INNER + 127) // 128
    WORDS: tl.constexpr = 8 * BITS
    GROUPS: tl.constexpr = 1 if GROUP >= 128 else 128 // GROUP
    KINDS: tl.constexpr = 1 + HAS_ZEROS + HAS_OFFSETS
    RECORD: tl.constexpr = GROUPS * KINDS * (1 if HIP else 2)
    RECORDS: tl.constexpr = INNER // GROUP if GROUP >= 128 else UNITS
    RECORD_STRIDE: tl.constexpr = RECORD * (64 if HIP else 32)
    PARTS: tl.constexpr = GROUPS if SCALE_SUMS else 1
    rows = tl.arange(0, BLOCK_M)
    k = tl.arange(0, 128 // PARTS)
    is_row = (first_row + rows < num_rows)[None, :]
    x_tile = x_ptr + first_row * x_stride * UNIT
    x_offsets = k[:, None] + (rows * x_stride * UNIT)[None, :]
    words_start = words_ptr + row_block.to(tl.int64) * (UNITS * 64 * WORDS)
    words_offsets = word_offsets(UNITS * 64 * WORDS, BLOCKS, WARP_GROUPS, WORDS)
    records_start = records_ptr + row_block * (RECORDS * RECORD_STRIDE)
    records_offsets = record_offsets(RECORDS * RECORD_STRIDE, BLOCKS, RECORD, HIP)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    SPLIT: tl.constexpr = (UNITS + SPLITS - 1) // SPLITS
    first_unit = split * SPLIT
    for unit in tl.range(first_unit, tl.minimum(first_unit + SPLIT, UNITS), num_stages=STAGES):
        words = tl.load(words_start + words_offsets + unit * (64 * WORDS))
        words = words_tile(words, BLOCKS, WARP_GROUPS, WORDS, HIP)
        record = unit if GROUP <= 128 else unit * 128 // GROUP
        records = tl.load(records_start + records_offsets + record * RECORD_STRIDE)
        records = records_tile(records, BLOCKS, GROUPS, KINDS, HIP)
        for part in tl.static_range(PARTS):
            start = unit * 128 + part * (128 // PARTS)
            is_x = is_row
            if INNER % 128 != 0:
                is_x = is_x & (start + k < INNER)[:, None]
            # Rows that are none cost no traffic.
            x = tl.load(x_tile + start + x_offsets, mask=is_x, other=0.0)
            if SCALE_SUMS:
                weight, words = codes_of_part(
                    words, records, part, PARTS, BITS, ZERO, HAS_ZEROS, x.dtype, HIP, PTX
                )
                scale = pick(pick(records.permute(0, 1, 3, 2), part), 0)
                acc += tl.dot(weight, x) * over_columns(scale.to(tl.float32), BLOCK_M)
            else:
                weight = scaled_unit(
                    words, records, table_ptr, BITS, GROUP, ZERO, HAS_ZEROS, HAS_OFFSETS, x.dtype, HIP, PTX
                )
                acc = finished(tl.dot(weight, x, acc), PTX)
    first_column = tl.program_id(1) * BLOCK_N
    y_tile = y_ptr + first_row * (SIZE // (1 if ACTIVATION is None else 2))
    if SPLITS == 1:
        _store(acc, bias_ptr, y_tile, first_column, rows, is_row, SIZE, ACTIVATION, BLOCK_M, BLOCK_N)
    else:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        arrived = leave_partial(acc, partials_ptr, counters_ptr, tile, split, SPLITS, FENCE_THREADS)
        if arrived == SPLITS - 1:
            acc = sum_partials(partials_ptr, counters_ptr, tile, SPLITS, BLOCK_N, BLOCK_M)
            _store(acc, bias_ptr, y_tile, first_column, rows, is_row, SIZE, ACTIVATION, BLOCK_M, BLOCK_N)


@triton.jit
def _store(
    acc,
    bias_ptr,
    y_tile,
    first_column,
    rows,
    is_row,
    SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write sums [BLOCK_N, BLOCK_M] to y, with the bias or through the gate."""
    if bias_ptr is not None:
        columns = first_column + tl.arange(0, BLOCK_N)
        acc += tl.load(bias_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)[:, None]
    HALVES: tl.constexpr = 1 if ACTIVATION is None else 2
    if ACTIVATION is not None:
        gate, up = acc.reshape(BLOCK_N // 16, 2, 8, BLOCK_M).permute(0, 2, 3, 1).split()
        acc = (_activated(gate, ACTIVATION) * up).reshape(BLOCK_N // 2, BLOCK_M)
    columns = first_column // HALVES + tl.arange(0, BLOCK_N // HALVES)
    stride: tl.constexpr = SIZE // HALVES
    is_y = is_row & (columns < stride)[:, None]
    tl.store(y_tile + rows[None, :] * stride + columns[:, None], acc.to(y_tile.dtype.element_ty), mask=is_y)


def wna16_matmul(
    x: torch.Tensor,
    weight: WNA16Operand,
    bias: torch.Tensor | None = None,
    *,
    activation: GatedActivation | None = None,
    deterministic: bool = False,
) -> torch.Tensor:
    """x W^T + bias: x (M, K) to (M, N), contiguous and of x's type; with an activation (M, N / 2).

    bias: (N), in the order of the operand's rows. activation: for operands that are gated. deterministic: a
    row's result does not depend on how many are beside it. KernelError for other shapes, strides and types.
    """
    unit, stride = product_rows("wna16_matmul", x)
    num_rows, inner = x.shape
    variant = _variant(
        target_of(x),
        x.dtype,
        inner,
        unit,
        weight.facts,
        layout(weight.records),
        layout(bias),
        activation,
        row_bucket(num_rows, ROW_BUCKETS),
        deterministic,
        x.device.type != "cpu",
    )
    constants = variant.constants
    size = constants["SIZE"]
    y = x.new_empty((num_rows, size if activation is None else size // 2))
    grid = -(-num_rows // constants["BLOCK_M"]), -(-size // constants["BLOCK_N"]), constants["SPLITS"]
    workspace = split_workspace(weight.counters, constants, grid, torch.float32)
    given = (x, weight.words, weight.records, weight.table, bias, y, *workspace)
    variant.start(grid, *given, num_rows, stride)
    return y


@cache
def _variant(
    target: Target,
    dtype: torch.dtype,
    inner: int,
    unit: int,
    facts: Facts,
    records: Layout | None,
    bias: Layout | None,
    activation: str | None,
    bucket: int,
    deterministic: bool,
    compiled: bool,
) -> Variant:
    """dtype, inner: x's and its K. unit: see aligned_strides. compiled: not interpreted."""
    assert records is not None
    _check(target, dtype, inner, facts, bias, activation)

    def heuristic() -> KernelConfig:
        return config_for(target, facts, bucket, deterministic=deterministic)

    # A table has what is fastest for a number of rows, and that is what must not matter.
    key = f"{dtype},{records[0]},{facts.key}"
    config = heuristic() if deterministic else pick_config("wna16_matmul", target, key, bucket, heuristic)
    return Variant(
        _wna16_matmul_kernel,
        config,
        UNIT=unit,
        SIZE=facts.shape[0],
        INNER=inner,
        BITS=facts.bits,
        GROUP=facts.group_size,
        ZERO=facts.zero,
        HAS_ZEROS=facts.has_zeros,
        HAS_OFFSETS=facts.has_offsets,
        ACTIVATION=activation,
        HIP=target.backend == "hip",
        PTX=compiled and target.backend == "cuda",
        FENCE_THREADS=fence_threads(target, config),
    )


def _check(
    target: Target,
    dtype: torch.dtype,
    inner: int,
    facts: Facts,
    bias: Layout | None,
    activation: str | None,
) -> None:
    if dtype not in _FLOATS or inner != facts.shape[1]:
        raise KernelError(
            f"wna16_matmul takes x (M, {facts.shape[1]}) of float16 or bfloat16 for a weight "
            f"{facts.shape}; it is (M, {inner}) {dtype}; convert it"
        )
    if facts.backend != target.backend:
        raise KernelError(
            f"the weight is laid out for {facts.backend}, not for {target.name}; pack it with "
            f"backend={target.backend!r}"
        )
    check_bias("wna16_matmul", bias, facts.shape)
    if (activation is not None) != facts.gated or activation not in (None, *_ACTIVATIONS):
        raise KernelError(
            f"activation {activation!r} does not suit a weight that is {'' if facts.gated else 'not '}laid "
            f"out as gate and up; use {'one of: ' + ', '.join(_ACTIVATIONS) if facts.gated else 'None'}"
        )


def _configs(target: Target, launch: Launch) -> list[KernelConfig]:
    return candidates(target, facts_of(launch), row_bucket(launch.args[0].shape[0], ROW_BUCKETS))


def _run(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    activation: GatedActivation | None,
    deterministic: bool,
    weight: WNA16Operand | None = None,
    **canonical: Any,
) -> Tensors:
    """canonical: what the operand is made of where there is none."""
    weight = weight or operand_of(**canonical, gated=activation is not None)
    return (wna16_matmul(x, weight, bias, activation=activation, deterministic=deterministic),)


SPECS = (
    KernelSpec(
        name="wna16_matmul",
        summary="product with a weight of integer codes with group scales, and the gated activation",
        launcher=_run,
        reference=reference,
        tolerance="wna16 matmul",
        cases=CASES,
        signatures=SIGNATURES,
        faults=(
            Fault("gate, up = acc", "up, gate = acc"),
            Fault("_activated(gate, ACTIVATION)", '_activated(gate, "silu")'),
            Fault("(start + k < INNER)", "(start + k < INNER - 1)"),
            Fault("first_row + rows < num_rows", "first_row + rows < num_rows - 1"),
            Fault("(columns < stride)", "(columns < stride - 1)"),
            Fault("acc += tl.load(bias_ptr", "acc -= tl.load(bias_ptr"),
            Fault("first_unit = split * SPLIT", "first_unit = 0 * SPLIT"),
            Fault("unit * 128 // GROUP", "unit * 64 // GROUP"),
            Fault("start = unit * 128 + part * (128 // PARTS)", "start = unit * 128"),
            Fault("permute(0, 1, 3, 2), part), 0)", "permute(0, 1, 3, 2), 0), 0)"),
            Fault("acc = sum_partials(", "sum_partials("),
            Fault("x_ptr + first_row * x_stride * UNIT", "x_ptr"),
            Fault("rows * x_stride * UNIT)", "rows * x_stride)"),
        ),
        matrix_product=True,
        # A step of bfloat16: weights that were rounded before move sums over the middle between two.
        space=TuningSpace(_wna16_matmul_kernel, _configs, case_of, error=1e-2),
    ),
)
