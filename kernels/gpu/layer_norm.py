"""LayerNorm and residual add + LayerNorm: y = (x - mean) / sqrt(variance + eps) * weight + bias.

Mean and variance (of all hidden, not hidden - 1) are over the last dimension, in float32, the variance from
the centred row, so that a large mean costs no digits. y is rounded once. The sum of x and residual is
rounded to their dtype, as the residual is kept.

Layouts: x (T, hidden) with unit stride in the last dimension; weight, bias (hidden), bias optional; y
contiguous. One program per row, which stays in registers. Moves 2 * T * hidden elements, with the add
4 * T * hidden.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from halimede.errors import KernelError
from halimede.kernels.gpu.rows import aligned_strides, row_warps
from halimede.kernels.launch import launch, target_of
from halimede.kernels.spec import Case, Fault, KernelSpec, Tensors, Work
from halimede.kernels.tuning import KernelConfig, next_power_of_2, pick_config

_LARGEST_ROW = 1 << 15


def layer_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """The oracle of layer_norm: float64 inside, rounded once."""
    wide = x.double()
    wide = wide - wide.mean(-1, keepdim=True)
    wide = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return (wide if bias is None else wide + bias.double()).to(x.dtype)


def add_layer_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> Tensors:
    """The oracle of add_layer_norm: (norm, sum), nothing changed in place."""
    total = (x.double() + residual.double()).to(x.dtype)
    return layer_norm_reference(total, weight, bias, eps), total


@triton.jit(do_not_specialize=["stride"])
def _layer_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    eps: tl.float32,
    stride,
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    mask = None if BLOCK == SIZE else offsets < SIZE
    other = None if BLOCK == SIZE else 0.0
    x = tl.load(x_ptr + row * stride * UNIT + offsets, mask=mask, other=other)
    dtype = x.dtype
    if ADD:
        residual = tl.load(residual_ptr + row * SIZE + offsets, mask=mask, other=other)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(residual_ptr + row * SIZE + offsets, x, mask=mask)
    wide = x.to(tl.float32)
    centred = wide - tl.sum(wide, axis=0) / SIZE
    if BLOCK != SIZE:
        centred = tl.where(offsets < SIZE, centred, 0.0)
    y = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / SIZE + eps)
    y *= tl.load(weight_ptr + offsets, mask=mask, other=other).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + offsets, mask=mask, other=other).to(tl.float32)
    tl.store(y_ptr + row * SIZE + offsets, y.to(dtype), mask=mask)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Norm x (T, hidden) by weight (hidden), plus bias (hidden) if there is one; contiguous, of x's dtype."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_layer_norm(x, None, weight, bias, y, eps)
    return y


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Add x (T, hidden) to `residual` (T, hidden, contiguous) in place and return the norm of the sum."""
    if residual.shape != x.shape or residual.dtype != x.dtype or not residual.is_contiguous():
        raise KernelError(
            f"add_layer_norm needs a contiguous residual like x, {tuple(x.shape)} {x.dtype}; it is "
            f"{tuple(residual.shape)} {residual.dtype}"
        )
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_layer_norm(x, residual, weight, bias, y, eps)
    return y


def _launch_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    eps: float,
) -> None:
    size = x.shape[-1]
    if (
        x.dim() != 2
        or x.stride(-1) != 1
        or size > _LARGEST_ROW
        or weight.shape != (size,)
        or (bias is not None and bias.shape != (size,))
    ):
        raise KernelError(
            f"layer_norm takes (T, hidden) with unit stride, weight and bias (hidden), hidden at most "
            f"{_LARGEST_ROW}; got {tuple(x.shape)} with strides {x.stride()}, {tuple(weight.shape)} and "
            f"{None if bias is None else tuple(bias.shape)}"
        )
    target = target_of(x)
    block = next_power_of_2(size)
    config = pick_config(
        "layer_norm",
        target,
        f"{x.dtype}",
        size,
        lambda: KernelConfig({"BLOCK": block}, num_warps=row_warps(block, target), num_stages=1),
    )
    unit, (stride,) = aligned_strides(x.shape[:1], x.stride(), x.dtype)
    launch(
        _layer_norm_kernel,
        (x.shape[0],),
        x,
        y if residual is None else residual,
        weight,
        weight if bias is None else bias,
        y,
        eps,
        stride,
        config=config,
        UNIT=unit,
        SIZE=size,
        ADD=residual is not None,
        BIAS=bias is not None,
    )


def _run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> Tensors:
    return (layer_norm(x, weight, bias, eps),)


def _reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> Tensors:
    return (layer_norm_reference(x, weight, bias, eps),)


def _run_add(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> Tensors:
    return add_layer_norm(x, residual, weight, bias, eps), residual


def _case(
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    add: bool = False,
    bias: bool = True,
    weight_dtype: torch.dtype | None = None,
    sliced: bool = False,
) -> Case:
    """Rows that are not centred. sliced: x is cut out of a wider tensor."""
    num_tokens, size = shape

    def make(device: torch.device) -> dict[str, Any]:
        x = torch.randn(num_tokens, size + 8 * sliced, device=device) * 3 + 5
        weight, shift = (torch.randn(2, size, device=device) / 4).to(weight_dtype or dtype)
        made = {"x": x.to(dtype)[:, 8 * sliced :], "weight": 1 + weight, "bias": shift if bias else None}
        made |= {"residual": torch.randn(shape, device=device).to(dtype)} if add else {}
        return made | {"eps": 1e-5}

    name = f"{shape} {dtype}{', no bias' * (not bias)}{', sliced' * sliced}"
    name += f", weight {weight_dtype}" if weight_dtype else ""
    elements = num_tokens * size
    return Case(name, make, Work(bytes=elements * dtype.itemsize * (4 if add else 2), flops=6 * elements))


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_SHAPES = ((1, 1), (3, 577), (2, 64), (0, 8))

SPECS = (
    KernelSpec(
        name="layer_norm",
        summary="LayerNorm of rows, with or without bias",
        launcher=_run,
        reference=_reference,
        tolerance="layer_norm",
        cases=(
            *(_case(shape, t) for shape in _SHAPES for t in (_BF16, _FP16, _FP32)),
            _case((3, 100), _FP32, bias=False),
            _case((3, 100), _BF16, weight_dtype=_FP32),
            _case((3, 128), _BF16, sliced=True),
        ),
        signatures=(
            _case((64, 768), _BF16),
            _case((64, 4096), _BF16, bias=False),
            _case((64, 8192), _FP16),
            _case((64, 12288), _BF16, weight_dtype=_FP32),
        ),
        faults=(
            Fault("tl.where(offsets < SIZE, centred, 0.0)", "centred"),
            Fault("tl.sum(wide, axis=0) / SIZE", "tl.sum(wide, axis=0) / BLOCK"),
            Fault("centred * centred, axis=0) / SIZE", "centred * centred, axis=0) / (SIZE - 1)"),
            Fault("y += tl.load", "y -= tl.load"),
            Fault("row * stride * UNIT", "row * SIZE"),
        ),
    ),
    KernelSpec(
        name="add_layer_norm",
        summary="residual add and LayerNorm in one pass",
        launcher=_run_add,
        reference=add_layer_norm_reference,
        tolerance="layer_norm",
        cases=(
            *(_case(shape, t, add=True) for shape in _SHAPES for t in (_BF16, _FP32)),
            _case((3, 100), _FP16, add=True, bias=False),
            _case((3, 136), _BF16, add=True, sliced=True),
        ),
        signatures=(
            _case((64, 1024), _BF16, add=True),
            _case((64, 5120), _FP16, add=True),
            _case((64, 8192), _BF16, add=True, bias=False),
        ),
        faults=(
            Fault("tl.store(residual_ptr + row * SIZE + offsets, x, mask=mask)", "pass"),
            Fault("+ residual.to(tl.float32)", "- residual.to(tl.float32)"),
            Fault("wide = x.to(tl.float32)", "wide = x.to(tl.float32) * 1.02 + 0.1"),
        ),
    ),
)
