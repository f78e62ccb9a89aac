"""Product of 8-bit codes, int8 or FP8, with scales of both sides: W8A8, and FP8 weights where no GPU
multiplies FP8.

    y[m, n] = sa[m] * sw[n] * (sum_k x[m, k] w[n, k] - zero[m] * sum_k w[n, k]) + bias[n]

or, scaled in blocks of R x C, the sum over groups g of 128 columns of

    sa[m, g] * sw[n // R, 128 g // C] * sum_{k in g} x[m, k] w[n, k]

Layouts: x (M, K) codes, unit stride in K; w [N, K] codes; sa (M), (1) or (M, K / 128) float32; sw [N] or
[N / R, K / C] float32; y (M, N) contiguous, 16 or 32 bits, rounded once. KIND says what is multiplied:

    int8    int8 codes, exact in int32; zero (M) or (1) int32, sums of w's rows int32
    fp8     float8_e4m3fn
    fnuz    the same codes on AMD's CDNA 3, whose FP8 has another bias: half the value, and no -0
    wide    w alone is FP8 and is widened to x's 16 bits in registers; x has no scales

Reads N * K bytes once per block of rows of x. The weight is the first operand, of which Hopper's products
want 64 rows; the batch is the cheap second one.

Hopper sums FP8 products with 14 bits or so. Where PROMOTE is 1 every 128 columns the sum goes to float32
registers (as DeepSeek-V3 does, arXiv 2412.19437, 3.3.2), which costs an addition for 128 products, and
half of the tile that fits in registers: with more than 256 rows and scales of rows it is 0, as in torch's
fast sums (docs/perf-log.md has both errors and times).

K is split as in wna16_matmul.py: fixed pieces, added in order by the last program to arrive.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from halimede.errors import KernelError
from halimede.kernels.gpu.float8 import e4m3_to_float16
from halimede.kernels.gpu.rows import check_bias, product_rows, row_bucket
from halimede.kernels.gpu.scaled_cases import CASES, SIGNATURES, case_of, operand_of, reference, scaling_of
from halimede.kernels.gpu.scaled_config import ROW_BUCKETS, can_be_described, candidates, config_for
from halimede.kernels.gpu.scaled_operand import ScaledOperand, Scaling
from halimede.kernels.gpu.split_k import fence_threads, leave_partial, split_workspace, sum_partials
from halimede.kernels.gpu.wna16_unit import finished
from halimede.kernels.launch import Launch, Variant, target_of
from halimede.kernels.spec import Fault, KernelSpec, Tensors, TuningSpace
from halimede.kernels.target import Target
from halimede.kernels.tuning import KernelConfig, pick_config
from halimede.kernels.variant_key import Layout, layout


@triton.jit(do_not_specialize=["num_rows", "x_stride"])
def _scaled_matmul_kernel(
    x_ptr,
    weight_ptr,
    x_scales_ptr,
    weight_scales_ptr,
    zeros_ptr,
    sums_ptr,
    bias_ptr,
    y_ptr,
    partials_ptr,
    counters_ptr,
    num_rows,
    x_stride,
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    INNER: tl.constexpr,
    KIND: tl.constexpr,
    NATIVE: tl.constexpr,
    SCALES_A_ROW: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    ZEROS_A_ROW: tl.constexpr,
    PTX: tl.constexpr,
    FENCE_THREADS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROMOTE: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Of GROUP_M blocks of rows those with one weight are neighbours, so that both stay in the L2 cache.
    blocks_m, blocks_n = tl.num_programs(0), tl.num_programs(1)
    program = tl.program_id(0) + tl.program_id(1) * blocks_m
    group = program // (GROUP_M * blocks_n)
    height = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    block_m = group * GROUP_M + program % (GROUP_M * blocks_n) % height
    block_n = program % (GROUP_M * blocks_n) // height
    split = tl.program_id(2)
    first_row = block_m * BLOCK_M
    first_column = block_n * BLOCK_N
    rows, columns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    is_row = (rows < num_rows)[None, :]
    k = tl.arange(0, BLOCK_K)
    # The last column again in place of those that are none: nothing is masked but the result.
    weight_rows = tl.minimum(columns, SIZE - 1) if SIZE % BLOCK_N != 0 else columns
    BLOCKED: tl.constexpr = SCALE_COLUMNS > 0
    TILES: tl.constexpr = (INNER + BLOCK_K - 1) // BLOCK_K
    SPLIT: tl.constexpr = (TILES + SPLITS - 1) // SPLITS
    if TMA:
        weight_tiles = tl.make_tensor_descriptor(weight_ptr, [SIZE, INNER], [INNER, 1], [BLOCK_N, BLOCK_K])
        x_tiles = tl.make_tensor_descriptor(
            x_ptr, [num_rows, INNER], [x_stride.to(tl.int64) * UNIT, 1], [BLOCK_M, BLOCK_K]
        )
    else:
        weight_tile = weight_ptr + weight_rows.to(tl.int64)[:, None] * INNER + k[None, :]
        x_tile = x_ptr + (rows.to(tl.int64) * x_stride * UNIT)[None, :] + k[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32 if KIND == "int8" else tl.float32)
    for tile in tl.range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, TILES), num_stages=STAGES):
        start = tile * BLOCK_K
        if TMA:
            weight = weight_tiles.load([first_column, start])
            x = x_tiles.load([first_row, start]).T
        else:
            is_x, is_weight, other = is_row, None, None
            if INNER % BLOCK_K != 0:
                is_k = start + k < INNER
                is_x, is_weight, other = is_x & is_k[:, None], is_k[None, :], 0.0
            weight = tl.load(weight_tile + start, mask=is_weight, other=other)
            x = tl.load(x_tile + start, mask=is_x, other=0.0)
        if KIND == "wide":
            weight = e4m3_to_float16(weight, NATIVE).to(x.dtype)
        if KIND == "fnuz":
            x = tl.where(x == 0x80, 0, x).to(tl.float8e4b8, bitcast=True)
        if BLOCKED:
            scale = tl.load(
                weight_scales_ptr
                + weight_rows // SCALE_ROWS * ((INNER + SCALE_COLUMNS - 1) // SCALE_COLUMNS)
                + start // SCALE_COLUMNS
            )[:, None]
            if KIND != "wide":
                x_scales = x_scales_ptr + rows * ((INNER + 127) // 128) + start // 128
                scale = scale * tl.load(x_scales, mask=rows < num_rows, other=0.0)[None, :]
            acc += tl.dot(weight, x) * scale
        elif KIND == "int8":
            acc = tl.dot(weight, x, acc, out_dtype=tl.int32)
        elif KIND == "wide":
            acc = finished(tl.dot(weight, x, acc), PTX)
        elif PROMOTE:
            acc += tl.dot(weight, x)
        else:
            acc = tl.dot(weight, x, acc)
    if SPLITS > 1:
        number = block_n * blocks_m + block_m
        arrived = leave_partial(acc, partials_ptr, counters_ptr, number, split, SPLITS, FENCE_THREADS)
        if arrived != SPLITS - 1:
            return
        acc = sum_partials(partials_ptr, counters_ptr, number, SPLITS, BLOCK_N, BLOCK_M)
    is_column = columns < SIZE
    if zeros_ptr is not None:
        zeros = (
            tl.load(zeros_ptr + rows, mask=rows < num_rows, other=0) if ZEROS_A_ROW else tl.load(zeros_ptr)
        )
        sums = tl.load(sums_ptr + columns, mask=is_column, other=0)[:, None]
        acc -= sums * (zeros[None, :] if ZEROS_A_ROW else zeros)
    y = acc.to(tl.float32)
    if not BLOCKED:
        y *= tl.load(weight_scales_ptr + columns, mask=is_column, other=0.0)[:, None]
        if KIND != "wide":
            if SCALES_A_ROW:
                y *= tl.load(x_scales_ptr + rows, mask=rows < num_rows, other=0.0)[None, :]
            else:
                y *= tl.load(x_scales_ptr)
    if KIND == "fnuz":
        y *= 4.0  # a code of either side means half of what it does elsewhere
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)[:, None]
    y_tile = y_ptr + rows.to(tl.int64)[None, :] * SIZE + columns[:, None]
    tl.store(y_tile, y.to(y_ptr.dtype.element_ty), mask=is_row & is_column[:, None])


def scaled_matmul(
    x: torch.Tensor,
    x_scales: torch.Tensor | None,
    weight: ScaledOperand,
    bias: torch.Tensor | None = None,
    *,
    dtype: torch.dtype,
    zeros: torch.Tensor | None = None,
    deterministic: bool = False,
) -> torch.Tensor:
    """x (M, K) times w^T, scaled: (M, N) of dtype, contiguous; see the module's docstring.

    x: codes of the operand's kind, or for a "wide" one activations of 16 bits, without scales. zeros: (M)
    or (1) int32, for int8. deterministic: a row's result does not depend on how many are beside it.
    KernelError for other shapes, strides and types.
    """
    unit, stride = product_rows("scaled_matmul", x)
    num_rows, inner = x.shape
    if weight.scaling.kind == "fnuz":
        x = x.view(torch.uint8)
    variant = _variant(
        target_of(x),
        x.dtype,
        inner,
        unit,
        weight.scaling,
        layout(weight.codes),
        _per_row(x_scales, torch.float32, num_rows, weight.scaling),
        _per_row(zeros, torch.int32, num_rows, weight.scaling),
        layout(bias),
        dtype,
        row_bucket(num_rows, ROW_BUCKETS),
        deterministic,
        x.device.type != "cpu",
    )
    constants, scaling = variant.constants, weight.scaling
    size = constants["SIZE"]
    y = x.new_empty((num_rows, size), dtype=dtype)
    grid = -(-num_rows // constants["BLOCK_M"]), -(-size // constants["BLOCK_N"]), constants["SPLITS"]
    sums_dtype = torch.int32 if scaling.kind == "int8" else torch.float32
    workspace = split_workspace(weight.counters, constants, grid, sums_dtype)
    given = (x, weight.codes, x_scales, weight.scales, zeros, weight.sums, bias, y, *workspace)
    variant.start(grid, *given, num_rows, stride)
    return y


def _per_row(tensor: torch.Tensor | None, dtype: torch.dtype, num_rows: int, scaling: Scaling) -> str | None:
    """Of scales or zeros of x, which are of dtype: "row", "one", "group"; None where there are none."""
    if tensor is None:
        return None
    if tensor.dtype != dtype or not tensor.is_contiguous():
        raise KernelError(
            f"scaled_matmul takes contiguous scales (float32) and zeros (int32) of x; got "
            f"{'' if tensor.is_contiguous() else 'strided '}{tensor.dtype} for {dtype}; convert them"
        )
    if tensor.numel() == 1 and num_rows != 1:
        return "one"
    groups = -(-scaling.shape[1] // 128)
    if tensor.numel() == num_rows * groups and scaling.block is not None:
        return "group"
    if tensor.numel() == num_rows:
        return "row"
    raise KernelError(
        f"scaled_matmul takes a scale for all of x, each row ({num_rows}) or each 128 columns "
        f"({num_rows}, {groups}) of it; got {tuple(tensor.shape)}"
    )


@cache
def _variant(
    target: Target,
    dtype: torch.dtype,
    inner: int,
    unit: int,
    scaling: Scaling,
    codes: Layout | None,
    x_scales: str | None,
    zeros: str | None,
    bias: Layout | None,
    y_dtype: torch.dtype,
    bucket: int,
    deterministic: bool,
    compiled: bool,
) -> Variant:
    """dtype, inner: x's and its K. unit: see aligned_strides. x_scales, zeros: see _per_row. compiled: not
    interpreted."""
    _check(dtype, inner, scaling, x_scales, zeros, bias)
    assert codes is not None

    def heuristic() -> KernelConfig:
        return config_for(target, scaling, bucket, unit, deterministic=deterministic)

    key = f"{dtype},{scaling.key}"
    config = heuristic() if deterministic else pick_config("scaled_matmul", target, key, bucket, heuristic)
    if config.blocks["TMA"] and not can_be_described(target, scaling, unit, bucket):
        config = heuristic()  # a table's, from rows that lie otherwise
    block = scaling.block
    return Variant(
        _scaled_matmul_kernel,
        config,
        UNIT=unit,
        SIZE=scaling.shape[0],
        INNER=inner,
        KIND=scaling.kind,
        NATIVE=target.native_e4m3,
        SCALES_A_ROW=x_scales == "row",
        SCALE_ROWS=0 if block is None else block[0],
        SCALE_COLUMNS=0 if block is None else block[1],
        ZEROS_A_ROW=zeros == "row",
        PTX=compiled and target.backend == "cuda",
        FENCE_THREADS=fence_threads(target, config),
    )


def _check(
    dtype: torch.dtype,
    inner: int,
    scaling: Scaling,
    x_scales: str | None,
    zeros: str | None,
    bias: Layout | None,
) -> None:
    takes = scaling.activations
    if dtype not in takes or inner != scaling.shape[1]:
        raise KernelError(
            f"scaled_matmul takes x (M, {scaling.shape[1]}) of {' or '.join(map(str, takes))} for a weight "
            f"{scaling.shape} of kind {scaling.kind!r}; it is (M, {inner}) {dtype}; convert it"
        )
    wanted = None if scaling.kind == "wide" else "group" if scaling.block is not None else "row"
    if x_scales != wanted and not (wanted == "row" and x_scales == "one"):
        wants = "no scales of x" if wanted is None else f"a scale of x for each {wanted}"
        raise KernelError(
            f"scaled_matmul takes {wants} for a weight of kind {scaling.kind!r}"
            f"{' in blocks' if scaling.block else ''}; got {x_scales or 'none'}; see the form's `quantizes`"
        )
    if zeros is not None and not scaling.has_sums:
        raise KernelError("scaled_matmul takes zeros for int8 weights with sums of their rows; make them")
    check_bias("scaled_matmul", bias, scaling.shape)


def _configs(target: Target, launch: Launch) -> list[KernelConfig]:
    bucket = row_bucket(launch.args[0].shape[0], ROW_BUCKETS)
    return candidates(target, scaling_of(launch), bucket, launch.constants["UNIT"])


def _run(x: torch.Tensor, x_scales: torch.Tensor | None, deterministic: bool, **given: Any) -> Tensors:
    weight, rest = operand_of(x, **given)
    return (scaled_matmul(x, x_scales, weight, deterministic=deterministic, **rest),)


SPECS = (
    KernelSpec(
        name="scaled_matmul",
        summary="product of int8 or FP8 codes with the scales of both sides",
        launcher=_run,
        reference=reference,
        tolerance="scaled matmul",
        cases=CASES,
        signatures=SIGNATURES,
        faults=(
            Fault("acc -= sums * ", "acc += sums * "),
            Fault("is_k = start + k < INNER", "is_k = start + k < INNER - 1"),
            Fault("is_row = (rows < num_rows)", "is_row = (rows < num_rows - 1)"),
            Fault("is_column = columns < SIZE", "is_column = columns < SIZE - 1"),
            Fault("tl.minimum(columns, SIZE - 1)", "tl.minimum(columns, SIZE - 2)"),
            Fault("y += tl.load(bias_ptr", "y -= tl.load(bias_ptr"),
            Fault("+ start // SCALE_COLUMNS", "+ start // SCALE_COLUMNS * 0"),
            Fault("weight_rows // SCALE_ROWS *", "weight_rows // SCALE_ROWS * 0 *"),
            Fault("+ start // 128", "+ start // 128 * 0"),
            Fault("acc = sum_partials(", "sum_partials("),
            Fault("tl.range(split * SPLIT,", "tl.range(0 * SPLIT,"),
            Fault("y *= tl.load(x_scales_ptr + rows", "y *= tl.load(x_scales_ptr + rows * 0"),
        ),
        matrix_product=True,
        # Hopper's sums of FP8 products, where they stay in the tensor cores, keep some 14 bits.
        space=TuningSpace(_scaled_matmul_kernel, _configs, case_of, error=2e-2),
    ),
)
