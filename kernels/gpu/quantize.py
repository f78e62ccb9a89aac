"""Quantizes activations to float8_e4m3fn or int8: codes = round(x * (1 / scale)) to nearest even, saturated.

Scales: dynamic, absmax / 448 (float8) or absmax / 127 (int8), of a token or of each group of its elements
(128 for block FP8); or static, one per tensor. x is finite.
Layouts: x (T, hidden) with unit stride in the last dimension; codes (T, hidden); scales float32, (T),
(T, hidden / group_size) or the given (1). Moves T * hidden elements in and as many bytes out.

One program per row where the row has one scale of its own, which stays in registers; else one per block of
a row, so that few rows fill a GPU too. The @triton.jit helpers also end the kernels of norm_quant.py and
activation.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from halimede.errors import KernelError
from halimede.kernels.gpu.float8 import E4M3_MAX, float32_to_e4m3
from halimede.kernels.gpu.quantize_cases import (
    FP8,
    FP8_GROUPS,
    INT8,
    SMALLEST_SCALE,
    Quant,
    code_positions,
    quant_case,
    quantize_reference,
    static,
)
from halimede.kernels.gpu.rows import aligned_strides, row_warps
from halimede.kernels.launch import launch, target_of
from halimede.kernels.spec import Case, Fault, KernelSpec, Tensors
from halimede.kernels.target import Target
from halimede.kernels.tuning import KernelConfig, next_power_of_2, pick_config

LARGEST_TOKEN = 1 << 15
"""Elements of a row that one program keeps in its registers."""

_INT8_MAX = tl.constexpr(127.0)
# Below any activation's; its inverse is finite. The scale of a row of zeros.
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_ROUNDING = tl.constexpr(1.5 * 2**23)


@triton.jit
def tile_offsets(block, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets, in a row, of its block'th BLOCK elements, as (G, C): each of the G rows has one scale.

    GROUP: elements of a scale, or 0 for the whole row's. A group is then a few neighbouring threads' work.
    """
    COLUMNS: tl.constexpr = BLOCK if GROUP == 0 else GROUP
    groups = block * (BLOCK // COLUMNS) + tl.arange(0, BLOCK // COLUMNS)
    return groups[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _absmax_scales(y, FP8: tl.constexpr):
    """The dynamic scales (G) of y (G, C) float32."""
    absmax = tl.max(tl.abs(y), axis=1)
    # Not `/`, which differs from the rounded quotient in the last bit on some GPUs.
    return tl.maximum(tl.div_rn(absmax, E4M3_MAX if FP8 else _INT8_MAX), _SMALLEST_SCALE)


@triton.jit
def _encode(y, FP8: tl.constexpr, NATIVE: tl.constexpr):
    """Scaled float32 to codes, as bytes (float8) or int8."""
    if FP8:
        codes = float32_to_e4m3(y, NATIVE)
    else:
        # The sum's last bits are the integer, which the addition rounds to nearest even.
        shifted = tl.minimum(tl.maximum(y, -_INT8_MAX - 1), _INT8_MAX) + _ROUNDING
        codes = shifted.to(tl.int32, bitcast=True).to(tl.int8)
    return codes


@triton.jit
def store_quantized(
    y,
    row,
    block,
    codes_ptr,
    scales_ptr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    STATIC: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantize y, float32 at tile_offsets of a row of SIZE and 0 beyond it, and store codes and scales.

    row: int64. STATIC: scales_ptr has the one scale to use; else the scales found are stored there.
    """
    offsets = tile_offsets(block, GROUP, BLOCK)
    mask = None if SIZE % BLOCK == 0 else offsets < SIZE
    if STATIC:
        inverse = tl.div_rn(1.0, tl.load(scales_ptr))
    else:
        PER_TILE: tl.constexpr = 1 if GROUP == 0 else BLOCK // GROUP
        PER_ROW: tl.constexpr = 1 if GROUP == 0 else SIZE // GROUP
        scales = _absmax_scales(y, FP8)
        groups = block * PER_TILE + tl.arange(0, PER_TILE)
        tl.store(scales_ptr + row * PER_ROW + groups, scales, mask=groups < PER_ROW)
        inverse = tl.div_rn(1.0, scales)[:, None]
    tl.store(codes_ptr + row * SIZE + offsets, _encode(y * inverse, FP8, NATIVE), mask=mask)


@triton.jit(do_not_specialize=["stride"])
def _quantize_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    stride,
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    STATIC: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    offsets = tile_offsets(block, GROUP, BLOCK)
    mask = None if SIZE % BLOCK == 0 else offsets < SIZE
    other = None if SIZE % BLOCK == 0 else 0.0
    x = tl.load(x_ptr + row * stride * UNIT + offsets, mask=mask, other=other).to(tl.float32)
    store_quantized(x, row, block, codes_ptr, scales_ptr, SIZE, GROUP, STATIC, FP8, NATIVE, BLOCK)


@dataclass(frozen=True, slots=True)
class QuantOutput:
    """What a kernel that ends in store_quantized writes, and that helper's constants.

    codes: (T, size), float8_e4m3fn or int8. scales: found or given.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    constants: dict[str, Any]

    @property
    def bytes(self) -> torch.Tensor:
        """The codes as the kernel sees them: float8 as uint8, because Triton refuses it on older GPUs."""
        return self.codes.view(torch.uint8) if self.codes.dtype == torch.float8_e4m3fn else self.codes

    @property
    def whole_rows(self) -> bool:
        """Whether a program needs the whole row to know a scale."""
        return not self.constants["STATIC"] and self.constants["GROUP"] == 0


def quant_output(
    x: torch.Tensor, size: int, dtype: torch.dtype, group_size: int | None, scale: torch.Tensor | None
) -> QuantOutput:
    """The output for (T, size) made of x (T, ...), checked; KernelError for options that clash."""
    if dtype not in (torch.float8_e4m3fn, torch.int8):
        raise KernelError(f"activations are quantized to float8_e4m3fn or int8, not to {dtype}")
    if scale is not None and (group_size or scale.dtype != torch.float32 or scale.numel() != 1):
        raise KernelError(
            f"a static scale is one float32, without group_size; got {tuple(scale.shape)} {scale.dtype} and "
            f"group_size={group_size}"
        )
    if group_size is not None and (group_size < 16 or group_size & (group_size - 1) or size % group_size):
        raise KernelError(
            f"group_size={group_size} is not a power of two from 16 that divides rows of {size}; "
            "leave it out for one scale per token"
        )
    if scale is None and group_size is None and size > LARGEST_TOKEN:
        raise KernelError(
            f"rows of {size} are too long for a scale per token, at most {LARGEST_TOKEN}; "
            "give group_size or a static scale"
        )
    codes = torch.empty((x.shape[0], size), dtype=dtype, device=x.device)
    if scale is None:
        shape = (x.shape[0],) if group_size is None else (x.shape[0], size // group_size)
        scales = torch.empty(shape, dtype=torch.float32, device=x.device)
    else:
        scales = scale
    constants = {
        "GROUP": group_size or 0,
        "STATIC": scale is not None,
        "FP8": dtype == torch.float8_e4m3fn,
        "NATIVE": target_of(x).native_e4m3,
    }
    return QuantOutput(codes, scales, constants)


def quant_config(kernel: str, x: torch.Tensor, size: int, output: QuantOutput) -> KernelConfig:
    """The config of a kernel with a program per row or per block of a row, as the scales need."""
    target = target_of(x)
    key = f"{x.dtype},{'row' if output.whole_rows else 'block'}"
    return pick_config(kernel, target, key, size, lambda: _heuristic(size, output, target))


def _heuristic(size: int, output: QuantOutput, target: Target) -> KernelConfig:
    block = next_power_of_2(size)
    if not output.whole_rows:
        block = max(output.constants["GROUP"], min(block, 1024))
    return KernelConfig({"BLOCK": block}, num_warps=row_warps(block, target), num_stages=1)


def per_token_quant(
    x: torch.Tensor,
    dtype: torch.dtype,
    group_size: int | None = None,
    scale: torch.Tensor | None = None,
) -> Tensors:
    """Quantize x (T, hidden): (codes (T, hidden) of dtype, scales float32).

    dtype: float8_e4m3fn or int8. group_size: elements of a scale, a power of two that divides hidden; the
    scales are then (T, hidden / group_size), else (T). scale: float32 (1) to use instead, and returned.
    """
    if x.dim() != 2 or x.stride(-1) != 1:
        raise KernelError(
            f"per_token_quant takes (T, hidden) with unit stride in the last dimension; "
            f"got {tuple(x.shape)} with strides {x.stride()}"
        )
    size = x.shape[1]
    output = quant_output(x, size, dtype, group_size, scale)
    config = quant_config("per_token_quant", x, size, output)
    unit, (stride,) = aligned_strides(x.shape[:1], x.stride(), x.dtype)
    launch(
        _quantize_kernel,
        (x.shape[0], triton.cdiv(size, config.blocks["BLOCK"])),
        x,
        output.bytes,
        output.scales,
        stride,
        config=config,
        UNIT=unit,
        SIZE=size,
        **output.constants,
    )
    return output.codes, output.scales


def _run(
    x: torch.Tensor,
    dtype: torch.dtype,
    group_size: int | None,
    scale: torch.Tensor | None,
    compared: bool,
) -> Tensors:
    output = per_token_quant(x, dtype, group_size, scale)
    return code_positions(output) if compared else output


def _reference(
    x: torch.Tensor,
    dtype: torch.dtype,
    group_size: int | None,
    scale: torch.Tensor | None,
    compared: bool,
) -> Tensors:
    return quantize_reference(x, dtype, group_size, scale)


def _case(
    shape: tuple[int, int], dtype: torch.dtype, quant: Quant, *, zeros: bool = False, sliced: bool = False
) -> Case:
    """Rows of very different sizes. zeros: the first row. sliced: x is cut out of a wider tensor."""
    num_tokens, size = shape

    def make(device: torch.device) -> dict[str, Any]:
        sizes = torch.exp(2 * torch.randn(num_tokens, 1, device=device))
        if zeros:
            sizes[0] = 0
        x = torch.randn(num_tokens, size + 24 * sliced, device=device) * sizes
        return {"x": x.to(dtype)[:, 24 * sliced :]}

    name = f"{shape} {dtype}{', first row 0' * zeros}{', sliced' * sliced}"
    return quant_case(name, make, quant, shape, num_tokens * size, dtype, compared=num_tokens < 64)


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32

SPECS = (
    KernelSpec(
        name="per_token_quant",
        summary="activations to float8_e4m3fn or int8; scales per token, per group or given",
        launcher=_run,
        reference=_reference,
        tolerance="quantize",
        cases=(
            *(
                _case(shape, dtype, quant, zeros=shape[0] > 1)
                for shape, dtype in (((3, 577), _BF16), ((1, 1), _FP32), ((0, 64), _FP16), ((2, 1024), _FP32))
                for quant in (FP8, INT8, static(torch.float8_e4m3fn, 0.005), static(torch.int8, 0.01))
            ),
            *(_case((3, n), _BF16, FP8_GROUPS, zeros=True) for n in (128, 640, 1152)),
            _case((3, 96), _FP16, Quant(torch.int8, group_size=32)),
            _case((4, 264), _BF16, INT8, sliced=True),
        ),
        signatures=(
            _case((64, 4096), _BF16, FP8),
            _case((64, 14336), _BF16, INT8),
            _case((64, 28672), _BF16, FP8),
            _case((64, 7168), _BF16, FP8_GROUPS),
            _case((64, 4096), _FP16, static(torch.float8_e4m3fn, 0.02)),
            _case((64, 5120), _BF16, static(torch.int8, 0.02)),
        ),
        faults=(
            Fault("absmax, E4M3_MAX", "absmax * 1.01, E4M3_MAX"),
            Fault("tl.abs(y)", "y"),
            Fault("offsets < SIZE", "offsets < SIZE - 1"),
            Fault("+ _ROUNDING", "+ (_ROUNDING + 1)"),
            Fault("-_INT8_MAX - 1), _INT8_MAX)", "-_INT8_MAX * 9), _INT8_MAX * 9)"),
            Fault("row * PER_ROW + groups", "row + groups"),
            Fault(", _SMALLEST_SCALE)", ", 0.0)"),
        ),
    ),
)
