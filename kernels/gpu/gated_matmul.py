"""Gate and up projection of a gated MLP with its activation, for the few rows of a decode step.

    y[m, n] = act(x[m] . w[n] + b[n]) * (x[m] . w[I + n] + b[I + n]),   act: silu or gelu_tanh (activation.py)

Layouts: x (M, K), unit stride in K; weight [2I, K] contiguous, the gate's rows before up's; bias (2I) or
none; y (M, I) contiguous; all of one 16-bit type. Sums are float32 and y is rounded once. A product and an
activation of two launches round gate and up to 16 bits in between, so their results differ in the last bits.

Reads 2 * I * K weights once, and M * K + 2I elements beside; writes M * I; 4 * M * I * K FLOPs. So with few
rows it waits for the weight alone, and fusing saves a launch and 4 * M * I elements that went through memory.

A program takes BLOCK_N columns of y: the tile of its product is BLOCK_N rows of gate's weight over the
BLOCK_N of up's, times x^T, and is cut in two at the end. The weight is the first operand because matrix
instructions want 64 rows of that (wgmma, tcgen05) and are content with 16 columns of the other: the batch.
One tile of both halves has 64 rows for only 32 columns of y, so a narrow MLP has programs for all processors.
x is read by every program, from L2: for 16 rows, 16 / (2 * BLOCK_N) of the weight's bytes.

K is not split and the blocks do not depend on M, so a row's sum has the same order, and the result the same
bits, at every run and whatever rows are beside it.
"""

import itertools
from functools import cache
from types import MappingProxyType
from typing import Literal, get_args

import torch
import triton
import triton.language as tl

from halimede.errors import KernelError
from halimede.kernels.gpu.activation import _activated
from halimede.kernels.gpu.gated_matmul_cases import CASES, SIGNATURES, case_of, reference
from halimede.kernels.gpu.rows import product_rows
from halimede.kernels.launch import Launch, Variant, target_of
from halimede.kernels.spec import Fault, KernelSpec, Tensors, TuningSpace
from halimede.kernels.target import Target
from halimede.kernels.tuning import KernelConfig, pick_config
from halimede.kernels.variant_key import Layout, layout

GatedActivation = Literal["silu", "gelu_tanh"]
_ACTIVATIONS = get_args(GatedActivation)
_FLOATS = (torch.float16, torch.bfloat16)

MAX_ROWS = 16
"""Up to so many rows it is meant for. More are right too, but each 16 rows read the weight again."""

_LARGEST_OFFSET = 1 << 31
# Of the largest GPU of each kind that is in wide use.
_PROCESSORS = MappingProxyType(
    {
        "sm_80": 108,
        "sm_86": 84,
        "sm_89": 142,
        "sm_90": 132,
        "sm_100": 148,
        "sm_120": 188,
        "gfx90a": 110,
        "gfx942": 304,
        "gfx950": 256,
        "gfx1100": 96,
        "gfx1201": 64,
    }
)


@triton.jit(do_not_specialize=["num_rows", "x_stride"])
def _gated_matmul_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    x_stride,
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    INNER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Blocks of rows are neighbours in the grid: those of the same weight run at about the same time.
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    first_column = tl.program_id(1) * BLOCK_N
    rows = tl.arange(0, BLOCK_M)
    is_row = first_row + rows < num_rows
    columns = tl.arange(0, BLOCK_N)
    halves = tl.arange(0, 2 * BLOCK_N)
    weight_rows = halves % BLOCK_N
    if SIZE % BLOCK_N != 0:
        # The last column again in place of those that are none: nothing is masked but the result.
        weight_rows = tl.minimum(weight_rows, SIZE - 1 - first_column)
    weight_rows += halves // BLOCK_N * SIZE
    k = tl.arange(0, BLOCK_K)
    x_tile = x_ptr + first_row * x_stride * UNIT
    weight_tile = weight_ptr + first_column.to(tl.int64) * INNER
    x_offsets = k[:, None] + (rows * x_stride * UNIT)[None, :]
    weight_offsets = weight_rows[:, None] * INNER + k[None, :]
    acc = tl.zeros([2 * BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(0, INNER, BLOCK_K):
        is_x, is_weight, other = is_row[None, :], None, None
        if INNER % BLOCK_K != 0:
            is_k = start + k < INNER
            is_x, is_weight, other = is_x & is_k[:, None], is_k[None, :], 0.0
        weight = tl.load(weight_tile + start + weight_offsets, mask=is_weight, other=other)
        # Rows that are none cost no traffic.
        x = tl.load(x_tile + start + x_offsets, mask=is_x, other=0.0)
        acc = tl.dot(weight, x, acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + first_column + weight_rows).to(tl.float32)[:, None]
    gate, up = acc.reshape(2, BLOCK_N, BLOCK_M).permute(1, 2, 0).split()
    y = _activated(gate, ACTIVATION) * up
    is_y = is_row[None, :]
    if SIZE % BLOCK_N != 0:
        is_y = is_y & (first_column + columns < SIZE)[:, None]
    y_tile = y_ptr + first_row * SIZE + first_column
    tl.store(y_tile + rows[None, :] * SIZE + columns[:, None], y.to(y_ptr.dtype.element_ty), mask=is_y)


def gated_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: GatedActivation = "silu",
) -> torch.Tensor:
    """act(x Wg^T + bg) * (x Wu^T + bu): x (M, K) to (M, I), contiguous and of x's dtype.

    weight: [2I, K], Wg over Wu. bias: (2I), bg before bu. Meant for at most MAX_ROWS rows. KernelError for
    other shapes, strides and types.
    """
    unit, stride = product_rows("gated_matmul", x)
    num_rows, inner = x.shape
    variant = _variant(target_of(x), x.dtype, inner, unit, layout(weight), layout(bias), activation)
    constants = variant.constants
    size = constants["SIZE"]
    y = x.new_empty((num_rows, size))
    grid = -(-num_rows // constants["BLOCK_M"]), -(-size // constants["BLOCK_N"])
    variant.start(grid, x, weight, bias, y, num_rows, stride)
    return y


@cache
def _variant(
    target: Target,
    dtype: torch.dtype,
    inner: int,
    unit: int,
    weight: Layout | None,
    bias: Layout | None,
    activation: str,
) -> Variant:
    """dtype, inner: x's and its K. unit: see aligned_strides."""
    assert weight is not None
    if activation not in _ACTIVATIONS:
        raise KernelError(f"activation {activation!r} is unknown; use one of: {', '.join(_ACTIVATIONS)}")
    weight_dtype, shape, contiguous = weight
    fits = len(shape) == 2 and shape[0] % 2 == 0 and shape[1] == inner and shape.numel() < _LARGEST_OFFSET
    if not fits or not contiguous or weight_dtype != dtype or dtype not in _FLOATS:
        raise KernelError(
            f"gated_matmul takes x (M, K) of float16 or bfloat16 and a contiguous weight [2I, K] of its type"
            f", less than 2^31 elements; they are (M, {inner}) {dtype} and "
            f"{'' if contiguous else 'strided '}{tuple(shape)} {weight_dtype}; make them so"
        )
    if bias is not None and bias != (dtype, shape[:1], True):
        raise KernelError(
            f"gated_matmul takes a contiguous bias ({shape[0]},) {dtype} for a weight {tuple(shape)}; it is "
            f"{'' if bias[2] else 'strided '}{tuple(bias[1])} {bias[0]}; convert it"
        )
    size = shape[0] // 2
    config = pick_config(
        "gated_matmul", target, f"{dtype},{inner}", size, lambda: _heuristic(target, size, inner)
    )
    return Variant(_gated_matmul_kernel, config, UNIT=unit, SIZE=size, INNER=inner, ACTIVATION=activation)


def _heuristic(target: Target, size: int, inner: int) -> KernelConfig:
    """size, inner: I and K. What counts is how many bytes of the weight are on their way to a processor."""
    choose = _cuda_choice if target.backend == "cuda" else _amd_choice
    block_n, block_k, num_warps, num_stages = choose(target, size, inner)
    blocks = {"BLOCK_M": 16, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return KernelConfig(blocks, num_warps=num_warps, num_stages=num_stages)


def _cuda_choice(target: Target, size: int, inner: int) -> tuple[int, int, int, int]:
    """(BLOCK_N, BLOCK_K, warps, stages): all programs at once, with as many tiles ahead as then fit.

    A second round of programs that does not fill the processors would leave bandwidth unused.
    """
    processors = _PROCESSORS[target.name]
    has_much = target.shared_memory >= 128 << 10
    block_n = 64 if has_much and size >= 96 * processors else 32
    programs = max(1, -(-size // (block_n * processors)))  # of a processor
    shared = (target.shared_memory + 1024) // programs - 1024 - 256  # the system's, and barriers
    block_k = 128
    tile = 2 * block_k * (2 * block_n + 16)
    if shared < 4 * tile or inner % block_k:
        block_k, tile = 64, tile // 2
    # Hopper's and Blackwell's matrix instructions still read a tile while the next one is loaded.
    kept = 1 if target.name in ("sm_90", "sm_100") else 0
    return block_n, block_k, 4, max(3, min(4 + kept, shared // tile + 1 - kept))


def _amd_choice(target: Target, size: int, inner: int) -> tuple[int, int, int, int]:
    """As _cuda_choice. A tile passes through registers, one at a time: more programs, not more stages.

    16 columns of y are two matrix instructions, and have work for two wavefronts.
    """
    if target.warp_size == 32:
        return 32, 64, 4, 2
    block_n = 32 if size >= 64 * _PROCESSORS[target.name] else 16
    # Where Triton loads into shared memory directly, and that is large, two tiles may be on their way.
    num_stages = 3 if target.name == "gfx950" else 2
    return block_n, 64 if inner % 128 else 128, block_n // 8, num_stages


def _configs(target: Target, launch: Launch) -> list[KernelConfig]:
    """What tuning tries. BLOCK_M stays, so that a row's result does not depend on how many there are."""
    inner, is_cuda = launch.constants["INNER"], target.backend == "cuda"
    found = []
    for block_n, block_k in itertools.product((16, 32, 64, 128), (64, 128, 256)):
        if inner % block_k and block_k > 64:
            continue
        tile = 2 * block_k * (2 * block_n + launch.constants["BLOCK_M"])
        for num_warps, num_stages in itertools.product(
            (4, 8) if is_cuda else (1, 2, 4, 8), (2, 3, 4, 5, 6) if is_cuda else (2, 3)
        ):
            if tile * (num_stages if is_cuda else 1) <= target.shared_memory:
                blocks = {"BLOCK_M": launch.constants["BLOCK_M"], "BLOCK_N": block_n, "BLOCK_K": block_k}
                found.append(KernelConfig(blocks, num_warps=num_warps, num_stages=num_stages))
    return found


def _run(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: GatedActivation
) -> Tensors:
    return (gated_matmul(x, weight, bias, activation=activation),)


SPECS = (
    KernelSpec(
        name="gated_matmul",
        summary="gate and up projection of a few rows, with the activation",
        launcher=_run,
        reference=reference,
        tolerance="gated matmul",
        cases=CASES,
        signatures=SIGNATURES,
        faults=(
            Fault("gate, up = acc", "up, gate = acc"),
            # What a product and an activation of two launches give.
            Fault("gate, up = acc", "gate, up = acc.to(y_ptr.dtype.element_ty).to(tl.float32)"),
            Fault("_activated(gate, ACTIVATION)", '_activated(gate, "silu")'),
            Fault("weight_rows += halves // BLOCK_N * SIZE", "weight_rows += halves // BLOCK_N * (SIZE - 1)"),
            Fault("SIZE - 1 - first_column", "SIZE - 2 - first_column"),
            Fault("first_column + columns < SIZE", "first_column + columns < SIZE - 1"),
            Fault("is_k = start + k < INNER", "is_k = start + k < INNER - 1"),
            Fault("first_row + rows < num_rows", "first_row + rows < num_rows - 1"),
            Fault("x_ptr + first_row * x_stride * UNIT", "x_ptr"),
            Fault("rows * x_stride * UNIT)", "rows * x_stride)"),
            Fault("acc += tl.load(bias_ptr", "acc -= tl.load(bias_ptr"),
        ),
        matrix_product=True,
        # Rounded once: half a step of bfloat16.
        space=TuningSpace(_gated_matmul_kernel, _configs, case_of, error=1e-2),
    ),
)
