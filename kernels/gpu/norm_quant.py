"""RMSNorm and residual add + RMSNorm with quantized output, for 8-bit GEMMs: norm.py, then quantize.py.

The norm is rounded to x's dtype where norm.py rounds it, and is quantized from there: fused or as two
kernels, the codes are the same, so fusing is never a question of accuracy, and a checkpoint sees the
activations it was calibrated with.

Layouts: x (T, hidden) with unit stride in the last dimension; weight (hidden); codes (T, hidden) and scales
as in quantize.py. One program per row, which stays in registers. Moves T * hidden elements in and as many
bytes out; with the add 3 * T * hidden elements and those bytes.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from halimede.errors import KernelError
from halimede.kernels.gpu.quantize import LARGEST_TOKEN, quant_output, store_quantized, tile_offsets
from halimede.kernels.gpu.quantize_cases import (
    FP8,
    FP8_GROUPS,
    INT8,
    Quant,
    code_positions,
    quant_case,
    quantize_reference,
    static,
)
from halimede.kernels.gpu.rows import aligned_strides, row_warps
from halimede.kernels.launch import launch, target_of
from halimede.kernels.spec import Case, Fault, KernelSpec, Tensors
from halimede.kernels.tuning import KernelConfig, next_power_of_2, pick_config


@triton.jit(do_not_specialize=["stride"])
def _rms_norm_quant_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    codes_ptr,
    scales_ptr,
    eps: tl.float32,
    stride,
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    ADD: tl.constexpr,
    GROUP: tl.constexpr,
    STATIC: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offsets = tile_offsets(0, GROUP, BLOCK)
    mask = None if BLOCK == SIZE else offsets < SIZE
    other = None if BLOCK == SIZE else 0.0
    x = tl.load(x_ptr + row * stride * UNIT + offsets, mask=mask, other=other)
    dtype = x.dtype
    if ADD:
        residual = tl.load(residual_ptr + row * SIZE + offsets, mask=mask, other=other)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(residual_ptr + row * SIZE + offsets, x, mask=mask)
    wide = x.to(tl.float32)
    squares = tl.sum(tl.sum(wide * wide, axis=1), axis=0)
    normed = wide * tl.rsqrt(squares / SIZE + eps)
    weight = tl.load(weight_ptr + offsets, mask=mask, other=other)
    if weight.dtype == dtype:
        normed = normed.to(dtype).to(tl.float32)
    y = (normed * weight.to(tl.float32)).to(dtype).to(tl.float32)
    store_quantized(y, row, 0, codes_ptr, scales_ptr, SIZE, GROUP, STATIC, FP8, NATIVE, BLOCK)


def rms_norm_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    group_size: int | None = None,
    scale: torch.Tensor | None = None,
) -> Tensors:
    """Norm x (T, hidden) by weight (hidden), quantized as by per_token_quant: (codes, scales)."""
    return _launch_norm_quant(x, None, weight, eps, dtype, group_size, scale)


def add_rms_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    group_size: int | None = None,
    scale: torch.Tensor | None = None,
) -> Tensors:
    """Add x (T, hidden) to `residual` (contiguous) in place; the norm of the sum: (codes, scales)."""
    if residual.shape != x.shape or residual.dtype != x.dtype or not residual.is_contiguous():
        raise KernelError(
            f"add_rms_norm_quant needs a contiguous residual like x, {tuple(x.shape)} {x.dtype}; it is "
            f"{tuple(residual.shape)} {residual.dtype}"
        )
    return _launch_norm_quant(x, residual, weight, eps, dtype, group_size, scale)


def _launch_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    group_size: int | None,
    scale: torch.Tensor | None,
) -> Tensors:
    size = x.shape[-1]
    if weight.shape != (size,) or x.dim() != 2 or x.stride(-1) != 1 or size > LARGEST_TOKEN:
        raise KernelError(
            f"rms_norm_quant takes (T, hidden) with unit stride and a weight (hidden), hidden at most "
            f"{LARGEST_TOKEN}; got {tuple(x.shape)} with strides {x.stride()} and {tuple(weight.shape)}"
        )
    output = quant_output(x, size, dtype, group_size, scale)
    target = target_of(x)
    block = next_power_of_2(size)
    config = pick_config(
        "rms_norm_quant",
        target,
        f"{x.dtype}",
        size,
        lambda: KernelConfig({"BLOCK": block}, num_warps=row_warps(block, target), num_stages=1),
    )
    unit, (stride,) = aligned_strides(x.shape[:1], x.stride(), x.dtype)
    launch(
        _rms_norm_quant_kernel,
        (x.shape[0],),
        x,
        x if residual is None else residual,
        weight,
        output.bytes,
        output.scales,
        eps,
        stride,
        config=config,
        UNIT=unit,
        SIZE=size,
        ADD=residual is not None,
        **output.constants,
    )
    return output.codes, output.scales


def _run(x: torch.Tensor, weight: torch.Tensor, eps: float, compared: bool, **quant: Any) -> Tensors:
    output = rms_norm_quant(x, weight, eps, **quant)
    return code_positions(output) if compared else output


def _run_add(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, compared: bool, **quant: Any
) -> Tensors:
    output = add_rms_norm_quant(x, residual, weight, eps, **quant)
    return *(code_positions(output) if compared else output), residual


def _reference(x: torch.Tensor, weight: torch.Tensor, eps: float, compared: bool, **quant: Any) -> Tensors:
    """In float64, rounded to x's dtype where the norm is."""
    wide = x.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    if weight.dtype == x.dtype:
        normed = normed.to(x.dtype).double()
    return quantize_reference((normed * weight.double()).to(x.dtype), **quant)


def _reference_add(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, compared: bool, **quant: Any
) -> Tensors:
    total = (x.double() + residual.double()).to(x.dtype)
    return *_reference(total, weight, eps, compared, **quant), total


def _case(
    shape: tuple[int, int],
    dtype: torch.dtype,
    quant: Quant,
    *,
    add: bool = False,
    weight_dtype: torch.dtype | None = None,
    sliced: bool = False,
) -> Case:
    """The first of several rows is 0. sliced: x is cut out of a wider tensor."""
    num_tokens, size = shape

    def make(device: torch.device) -> dict[str, Any]:
        x = torch.randn(num_tokens, size + 8 * sliced, device=device) * 3
        residual = torch.randn(shape, device=device)
        if num_tokens > 1:
            x[0], residual[0] = 0, 0
        weight = (1 + torch.randn(size, device=device) / 4).to(weight_dtype or dtype)
        made = {"x": x.to(dtype)[:, 8 * sliced :], "weight": weight, "eps": 1e-5}
        return made | {"residual": residual.to(dtype)} if add else made

    name = f"{shape} {dtype}{', sliced' * sliced}" + (f", weight {weight_dtype}" if weight_dtype else "")
    elements_moved = num_tokens * size * (3 if add else 1)
    return quant_case(name, make, quant, shape, elements_moved, dtype, compared=num_tokens < 64)


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_FP8_STATIC, _INT8_STATIC = static(torch.float8_e4m3fn, 0.005), static(torch.int8, 0.02)
_KINDS = (FP8, INT8, _FP8_STATIC, _INT8_STATIC)

SPECS = (
    KernelSpec(
        name="rms_norm_quant",
        summary="RMSNorm to float8_e4m3fn or int8; scales per token, per group or given",
        launcher=_run,
        reference=_reference,
        tolerance="norm_quantize",
        cases=(
            *(_case((3, 577), _FP32, quant) for quant in _KINDS),
            *(_case((2, 1024), _BF16, quant) for quant in (FP8_GROUPS, INT8)),
            *(_case((3, 640), t, FP8_GROUPS, sliced=True) for t in (_BF16, _FP32)),
            _case((1, 1), _FP32, FP8),
            _case((0, 64), _BF16, INT8),
            _case((3, 100), _FP16, _FP8_STATIC),
            _case((3, 100), _BF16, INT8, weight_dtype=_FP32),
        ),
        signatures=(
            _case((64, 4096), _BF16, FP8),
            _case((64, 8192), _BF16, INT8),
            _case((64, 5120), _FP16, _FP8_STATIC),
            _case((64, 2560), _BF16, _INT8_STATIC, weight_dtype=_FP32),
            _case((64, 7168), _BF16, FP8_GROUPS),
        ),
        faults=(
            Fault("squares / SIZE", "squares / BLOCK"),
            Fault("* weight.to(tl.float32)", "* weight.to(tl.float32) * 1.02"),
            Fault("row * stride * UNIT", "row * SIZE"),
            Fault("offsets < SIZE", "offsets < SIZE - 1"),
        ),
    ),
    KernelSpec(
        name="add_rms_norm_quant",
        summary="residual add and RMSNorm to float8_e4m3fn or int8 in one pass",
        launcher=_run_add,
        reference=_reference_add,
        tolerance="norm_quantize",
        cases=(
            *(_case((3, 577), _FP32, quant, add=True) for quant in _KINDS),
            _case((2, 1024), _BF16, FP8, add=True),
            _case((3, 640), _BF16, FP8_GROUPS, add=True, sliced=True),
            _case((0, 64), _BF16, INT8, add=True),
            _case((3, 100), _FP16, INT8, add=True),
        ),
        signatures=(
            _case((64, 4096), _BF16, FP8, add=True),
            _case((64, 7168), _BF16, FP8_GROUPS, add=True),
            _case((64, 8192), _BF16, INT8, add=True),
            _case((64, 4096), _FP16, _FP8_STATIC, add=True),
            _case((64, 5120), _BF16, _INT8_STATIC, add=True),
        ),
        faults=(
            Fault("tl.store(residual_ptr + row * SIZE + offsets, x, mask=mask)", "pass"),
            Fault("+ residual.to(tl.float32)", "- residual.to(tl.float32)"),
            Fault("squares / SIZE", "squares / (SIZE - 8)"),
        ),
    ),
)
