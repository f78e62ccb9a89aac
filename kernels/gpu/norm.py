"""RMSNorm and residual add + RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight over the last dimension.

Layouts: x (T, hidden), or heads (T, H, hidden) of a fused projection, unit stride in the last dimension;
weight (hidden); y contiguous. A program has one row, or several short ones, in registers. Moves
2 * T * hidden elements, with the add 4 * T * hidden.

Rounding is kernels/norm.py's: with a weight of x's dtype the norm is rounded before the product, with a
wider one (Gemma) after it. The sum of x and residual is rounded to their dtype, as the residual is kept.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from halimede.errors import KernelError
from halimede.kernels.gpu.rows import aligned_strides, row_warps
from halimede.kernels.launch import Variant, target_of
from halimede.kernels.norm import add_rms_norm_reference, rms_norm_reference
from halimede.kernels.spec import Case, Fault, KernelSpec, Tensors, Work
from halimede.kernels.target import Target
from halimede.kernels.tuning import KernelConfig, next_power_of_2, pick_config

_LARGEST_ROW = 1 << 15


@triton.jit(do_not_specialize=["num_rows", "outer_stride", "inner_stride"])
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    eps: tl.float32,
    num_rows,
    outer_stride,
    inner_stride,
    UNIT: tl.constexpr,
    INNER: tl.constexpr,
    SIZE: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    # No mask where none is needed: one instruction less for each access.
    fits = None if BLOCK == SIZE else columns < SIZE
    if ROWS == 1:
        mask = fits
    elif BLOCK == SIZE:
        mask = rows < num_rows
    else:
        mask = fits & (rows < num_rows)
    other = None if mask is None else 0.0
    x_rows = (rows // INNER * outer_stride + rows % INNER * inner_stride) * UNIT
    offsets = rows * SIZE + columns
    x = tl.load(x_ptr + x_rows + columns, mask=mask, other=other)
    dtype = x.dtype
    if ADD:
        residual = tl.load(residual_ptr + offsets, mask=mask, other=other)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(residual_ptr + offsets, x, mask=mask)
    wide = x.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, axis=1) / SIZE + eps)[:, None]
    weight = tl.load(weight_ptr + columns, mask=fits, other=None if fits is None else 0.0)
    if weight.dtype == dtype:
        normed = normed.to(dtype).to(tl.float32)
    y = normed * weight.to(tl.float32)
    tl.store(y_ptr + offsets, y.to(dtype), mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm x (T, hidden) or (T, H, hidden) by weight (hidden); contiguous, of x's shape and dtype."""
    y = x.new_empty(x.shape)
    _launch_norm(x, None, weight, y, eps)
    return y


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add x (T, hidden) to `residual` (T, hidden, contiguous) in place and return the norm of the sum."""
    if residual.shape != x.shape or residual.dtype != x.dtype or not residual.is_contiguous():
        raise KernelError(
            f"add_rms_norm needs a contiguous residual like x, {tuple(x.shape)} {x.dtype}; it is "
            f"{tuple(residual.shape)} {residual.dtype}"
        )
    y = x.new_empty(x.shape)
    _launch_norm(x, residual, weight, y, eps)
    return y


def _launch_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, y: torch.Tensor, eps: float
) -> None:
    shape, strides = x.shape, x.stride()
    size = shape[-1]
    if weight.shape != (size,) or len(shape) not in (2, 3) or strides[-1] != 1 or size > _LARGEST_ROW:
        raise KernelError(
            f"rms_norm takes (T, hidden) or (T, H, hidden) with unit stride and a weight (hidden), hidden at "
            f"most {_LARGEST_ROW}; got {tuple(shape)} with strides {strides} and {tuple(weight.shape)}"
        )
    unit, (outer_stride, *inner_stride) = aligned_strides(shape[:-1], strides, x.dtype)
    variant = _variant(
        target_of(x),
        (x.dtype, weight.dtype),
        size,
        shape[1] if inner_stride else 1,
        unit,
        residual is not None,
    )
    num_rows = y.numel() // size
    variant.start(
        (-(-num_rows // variant.constants["ROWS"]),),
        x,
        y if residual is None else residual,
        weight,
        y,
        eps,
        num_rows,
        outer_stride,
        *(inner_stride or (0,)),
    )


@cache
def _variant(
    target: Target, dtypes: tuple[torch.dtype, torch.dtype], size: int, inner: int, unit: int, add: bool
) -> Variant:
    """dtypes: of x and weight. inner: heads. unit: see aligned_strides."""
    config = pick_config("rms_norm", target, f"{dtypes[0]}", size, lambda: _heuristic(size, target))
    return Variant(_rms_norm_kernel, config, UNIT=unit, INNER=inner, SIZE=size, ADD=add)


def _heuristic(size: int, target: Target) -> KernelConfig:
    block = next_power_of_2(size)
    rows = max(1, 1024 // block)
    return KernelConfig(
        {"ROWS": rows, "BLOCK": block}, num_warps=row_warps(rows * block, target), num_stages=1
    )


def _run(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Tensors:
    return (rms_norm(x, weight, eps),)


def _reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Tensors:
    return (rms_norm_reference(x, weight, eps),)


def _run_add(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Tensors:
    return add_rms_norm(x, residual, weight, eps), residual


def _case(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    add: bool = False,
    weight_dtype: torch.dtype | None = None,
    sliced: bool = False,
) -> Case:
    """sliced: x is cut out of a larger tensor, rows of hidden out of longer ones, heads out of more."""

    def make(device: torch.device) -> dict[str, Any]:
        heads, columns = (2 * sliced, 0) if len(shape) == 3 else (0, 16 * sliced)
        whole = torch.randn(*shape[:-2], shape[-2] + heads, shape[-1] + columns, device=device)
        x = (whole * 3).to(dtype)[..., : shape[-2], : shape[-1]]
        weight = (1 + torch.randn(shape[-1], device=device) / 4).to(weight_dtype or dtype)
        made = {"x": x, "weight": weight, "eps": 1e-5}
        return made | {"residual": torch.randn(shape, device=device).to(dtype)} if add else made

    elements = torch.Size(shape).numel()
    return Case(name, make, Work(bytes=elements * dtype.itemsize * (4 if add else 2), flops=4 * elements))


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_SHAPES: tuple[tuple[int, ...], ...] = ((1, 1), (3, 577), (2, 64), (0, 8))
_SERVING = (576, 896, 2048, 4096, 5120, 8192)

SPECS = (
    KernelSpec(
        name="rms_norm",
        summary="RMSNorm of rows or heads; Gemma's float32 weight",
        launcher=_run,
        reference=_reference,
        tolerance="norm",
        cases=(
            *(_case(f"{shape} {t}", shape, t) for shape in _SHAPES for t in (_BF16, _FP16, _FP32)),
            _case("heads of a projection", (3, 2, 80), _BF16, sliced=True),
            _case("two tiles of heads", (3, 3, 128), _BF16, sliced=True),
            _case("float32 weight", (3, 100), _BF16, weight_dtype=_FP32),
        ),
        signatures=(
            *(_case(f"hidden {n}", (64, n), _BF16) for n in _SERVING),
            _case("hidden 2560, float32 weight", (64, 2560), _BF16, weight_dtype=_FP32),
            _case("heads of 128", (64, 8, 128), _BF16, sliced=True),
        ),
        faults=(
            Fault("/ SIZE + eps", "/ BLOCK * 0.9 + eps"),
            Fault("* weight.to", "* 1.03 * weight.to"),
            Fault("rows % INNER * inner_stride", "rows % INNER"),
            Fault("rows < num_rows", "rows < num_rows - 1"),
            Fault("columns < SIZE", "columns < SIZE - 1"),
        ),
    ),
    KernelSpec(
        name="add_rms_norm",
        summary="residual add and RMSNorm in one pass",
        launcher=_run_add,
        reference=add_rms_norm_reference,
        tolerance="norm",
        cases=(
            *(_case(f"{shape} {t}", shape, t, add=True) for shape in _SHAPES for t in (_BF16, _FP32)),
            _case("float16", (3, 100), _FP16, add=True),
            _case("slice", (2, 1032), _BF16, add=True, sliced=True),
            _case("slice, aligned to nothing", (18, 63), _BF16, add=True, sliced=True),
            _case("float32 weight", (3, 100), _BF16, add=True, weight_dtype=_FP32),
        ),
        signatures=(
            *(_case(f"hidden {n}", (64, n), _BF16, add=True) for n in _SERVING),
            _case("hidden 4096, float16", (64, 4096), _FP16, add=True),
        ),
        faults=(
            Fault("tl.store(residual_ptr + offsets, x, mask=mask)", "pass"),
            Fault("+ residual.to(tl.float32)", "- residual.to(tl.float32)"),
            Fault("* UNIT", ""),
        ),
    ),
)
