"""Activations: y = act(x), or gated y = act(gate) * up; alone or with quantized output (quantize.py).

    silu(g)      = g / (1 + exp(-g))
    gelu(g)      = g / 2 * (1 + erf(g / sqrt(2)))
    gelu_tanh(g) = g / 2 * (1 + tanh(u)) = g / (1 + exp(-2 u)),  u = sqrt(2 / pi) * (g + 0.044715 g^3)
    relu2(g)     = max(g, 0)^2

Layouts: x (T, I), or gated (T, 2I) with gate in the first I columns; unit stride in the last dimension;
y (T, I). In float32, rounded once to x's dtype; quantized from there, so that the codes are those of two
kernels. Moves T * I elements in (gated twice that) and as many out, quantized as many bytes.

A program has a block of a row, so that one row of decoding fills many processors too; with a scale per
token it has the row.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, get_args

import torch
import triton
import triton.language as tl

from halimede.errors import KernelError
from halimede.kernels.activation import gelu_tanh_and_mul_reference, silu_and_mul_reference
from halimede.kernels.gpu.quantize import quant_config, quant_output, store_quantized, tile_offsets
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
from halimede.kernels.launch import Variant, launch, target_of
from halimede.kernels.spec import Case, Fault, KernelSpec, Tensors, Work
from halimede.kernels.target import Target
from halimede.kernels.tuning import KernelConfig, next_power_of_2, pick_config

Activation = Literal["silu", "gelu", "gelu_tanh", "relu2"]
_ACTIVATIONS = get_args(Activation)

_LOG2_E = tl.constexpr(math.log2(math.e))
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_TANH_1 = tl.constexpr(2 * math.sqrt(2 / math.pi) * math.log2(math.e))
_TANH_3 = tl.constexpr(0.044715)


@triton.jit
def _activated(g, ACTIVATION: tl.constexpr):
    """float32 to float32. exp2 may be infinite: the quotient is then 0, as it should be."""
    if ACTIVATION == "silu":
        y = g / (1.0 + tl.exp2(g * -_LOG2_E))
    elif ACTIVATION == "gelu_tanh":
        y = g / (1.0 + tl.exp2((g + g * g * g * _TANH_3) * -_TANH_1))
    elif ACTIVATION == "gelu":
        y = 0.5 * g * (1.0 + tl.erf(g * _SQRT_HALF))
    else:
        y = tl.maximum(g, 0.0) * tl.maximum(g, 0.0)
    return y


@triton.jit
def _activated_tile(
    x_row, offsets, SIZE: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """y at `offsets` of a row, in x's dtype; 0 beyond SIZE."""
    mask = None if SIZE % BLOCK == 0 else offsets < SIZE
    other = None if SIZE % BLOCK == 0 else 0.0
    gate = tl.load(x_row + offsets, mask=mask, other=other)
    y = _activated(gate.to(tl.float32), ACTIVATION)
    if GATED:
        y *= tl.load(x_row + SIZE + offsets, mask=mask, other=other).to(tl.float32)
    return y.to(gate.dtype)


@triton.jit(do_not_specialize=["stride"])
def _activate_kernel(
    x_ptr,
    y_ptr,
    stride,
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = _activated_tile(x_ptr + row * stride * UNIT, offsets, SIZE, GATED, ACTIVATION, BLOCK)
    mask = None if SIZE % BLOCK == 0 else offsets < SIZE
    tl.store(y_ptr + row * SIZE + offsets, y, mask=mask)


@triton.jit(do_not_specialize=["stride"])
def _activate_quant_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    stride,
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GROUP: tl.constexpr,
    STATIC: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    x_row = x_ptr + row * stride * UNIT
    y = _activated_tile(x_row, tile_offsets(block, GROUP, BLOCK), SIZE, GATED, ACTIVATION, BLOCK)
    wide = y.to(tl.float32)
    store_quantized(wide, row, block, codes_ptr, scales_ptr, SIZE, GROUP, STATIC, FP8, NATIVE, BLOCK)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """(T, 2I) -> (T, I)."""
    return activate(x, "silu", gated=True)


def gelu_tanh_and_mul(x: torch.Tensor) -> torch.Tensor:
    """(T, 2I) -> (T, I)."""
    return activate(x, "gelu_tanh", gated=True)


def gelu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """(T, 2I) -> (T, I)."""
    return activate(x, "gelu", gated=True)


def activate(x: torch.Tensor, activation: Activation, *, gated: bool) -> torch.Tensor:
    """x (T, I), gated (T, 2I), to y (T, I), contiguous and of x's dtype."""
    shape, strides = x.shape, x.stride()
    size = _size_of_output(shape, strides, activation, gated)
    unit, (stride,) = aligned_strides(shape[:1], strides, x.dtype)
    variant = _variant(target_of(x), x.dtype, size, gated, activation, unit)
    y = x.new_empty((shape[0], size))
    variant.start((shape[0], -(-size // variant.constants["BLOCK"])), x, y, stride)
    return y


@cache
def _variant(
    target: Target, dtype: torch.dtype, size: int, gated: bool, activation: str, unit: int
) -> Variant:
    """size: of a row of y. unit: see aligned_strides."""
    block = min(1024, next_power_of_2(size))
    config = pick_config(
        "activate",
        target,
        f"{dtype}",
        size,
        # 8 elements a thread: at few rows more threads are worth more than more work for each.
        lambda: KernelConfig({"BLOCK": block}, num_warps=row_warps(2 * block, target), num_stages=1),
    )
    return Variant(_activate_kernel, config, UNIT=unit, SIZE=size, GATED=gated, ACTIVATION=activation)


def activate_quant(
    x: torch.Tensor,
    activation: Activation,
    *,
    gated: bool,
    dtype: torch.dtype = torch.float8_e4m3fn,
    group_size: int | None = None,
    scale: torch.Tensor | None = None,
) -> Tensors:
    """activate, then per_token_quant: (codes (T, I), scales)."""
    size = _size_of_output(x.shape, x.stride(), activation, gated)
    output = quant_output(x, size, dtype, group_size, scale)
    config = quant_config("activate_quant", x, size, output)
    unit, (stride,) = aligned_strides(x.shape[:1], x.stride(), x.dtype)
    launch(
        _activate_quant_kernel,
        (x.shape[0], triton.cdiv(size, config.blocks["BLOCK"])),
        x,
        output.bytes,
        output.scales,
        stride,
        config=config,
        UNIT=unit,
        SIZE=size,
        GATED=gated,
        ACTIVATION=activation,
        **output.constants,
    )
    return output.codes, output.scales


def _size_of_output(shape: tuple[int, ...], strides: tuple[int, ...], activation: str, gated: bool) -> int:
    """Of a row of y; shape and strides are x's. KernelError for what no activation takes."""
    if activation not in _ACTIVATIONS:
        raise KernelError(f"activation {activation!r} is unknown; use one of: {', '.join(_ACTIVATIONS)}")
    if len(shape) != 2 or strides[1] != 1 or (gated and shape[1] % 2):
        raise KernelError(
            f"an activation takes {'(T, 2I)' if gated else '(T, I)'} with unit stride in the last dimension; "
            f"got {tuple(shape)} with strides {strides}"
        )
    return shape[1] // 2 if gated else shape[1]


def activate_reference(x: torch.Tensor, activation: Activation, *, gated: bool) -> torch.Tensor:
    """The oracle of activate: float64 inside, rounded once."""
    if gated and activation == "silu":
        return silu_and_mul_reference(x)
    if gated and activation == "gelu_tanh":
        return gelu_tanh_and_mul_reference(x)
    gate, up = x.double().chunk(2, dim=-1) if gated else (x.double(), 1.0)
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": lambda g: g * torch.sigmoid(g),
        "gelu": lambda g: g / 2 * (1 + torch.erf(g * math.sqrt(0.5))),
        "gelu_tanh": lambda g: g / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))),
        "relu2": lambda g: g.clamp(min=0).square(),
    }
    return (functions[activation](gate) * up).to(x.dtype)


def _run(x: torch.Tensor, activation: Activation, gated: bool) -> Tensors:
    return (activate(x, activation, gated=gated),)


def _reference(x: torch.Tensor, activation: Activation, gated: bool) -> Tensors:
    return (activate_reference(x, activation, gated=gated),)


def _run_quant(x: torch.Tensor, activation: Activation, gated: bool, compared: bool, **quant: Any) -> Tensors:
    output = activate_quant(x, activation, gated=gated, **quant)
    return code_positions(output) if compared else output


def _reference_quant(
    x: torch.Tensor, activation: Activation, gated: bool, compared: bool, **quant: Any
) -> Tensors:
    return quantize_reference(activate_reference(x, activation, gated=gated), **quant)


def _case(
    shape: tuple[int, int],
    dtype: torch.dtype,
    activation: Activation = "silu",
    *,
    gated: bool = True,
    quant: Quant | None = None,
    sliced: bool = False,
) -> Case:
    """shape: of the output. In some gates exp overflows. sliced: x is cut out of a wider tensor."""
    num_tokens, size = shape
    columns = size * (2 if gated else 1)

    def make(device: torch.device) -> dict[str, Any]:
        x = torch.randn(num_tokens, columns + 8 * sliced, device=device) * 2
        if not quant:
            x[:, :size:5] *= 100
        return {"x": x.to(dtype)[:, 8 * sliced :], "activation": activation, "gated": gated}

    name = f"{activation}{'_and_mul' * gated} {shape} {dtype}{', sliced' * sliced}"
    elements_moved = num_tokens * columns
    if quant:
        return quant_case(name, make, quant, shape, elements_moved, dtype, compared=num_tokens < 64)
    num_bytes = (elements_moved + num_tokens * size) * dtype.itemsize
    return Case(name, make, Work(bytes=num_bytes, flops=8 * num_tokens * size))


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_FP8_STATIC, _INT8_STATIC = static(torch.float8_e4m3fn, 0.01), static(torch.int8, 0.05)

SPECS = (
    KernelSpec(
        name="activate",
        summary="SiLU, GELU, tanh GELU, squared ReLU; gated or not",
        launcher=_run,
        reference=_reference,
        tolerance="activation",
        cases=(
            *(
                _case((3, 577), dtype, activation, gated=gated)
                for activation in _ACTIVATIONS
                for gated in (False, True)
                for dtype in (_BF16, _FP32)
            ),
            *(_case((2, 1100), _FP16, activation) for activation in ("silu", "gelu", "gelu_tanh")),
            *(_case(shape, t) for shape in ((1, 1), (0, 64), (3, 1024)) for t in (_BF16, _FP32)),
            _case((3, 64), _BF16, sliced=True),
        ),
        signatures=(
            _case((64, 14336), _BF16),
            _case((64, 1536), _FP16),
            _case((64, 18432), _BF16, "gelu_tanh"),
            _case((64, 9216), _BF16, "gelu"),
            _case((64, 4864), _BF16, "relu2", gated=False),
        ),
        faults=(
            Fault("g * -_LOG2_E", "g * -1.43"),
            Fault("tl.constexpr(0.044715)", "tl.constexpr(0.045)"),
            Fault("tl.erf(g * _SQRT_HALF)", "tl.erf(g * 0.71)"),
            Fault("tl.maximum(g, 0.0) * ", ""),
            Fault("x_row + SIZE + offsets", "x_row + offsets"),
            Fault("tl.program_id(1) * BLOCK", "tl.program_id(1) * (BLOCK + 1)"),
            Fault("row * stride * UNIT", "row * stride"),
        ),
    ),
    KernelSpec(
        name="activate_quant",
        summary="activation to float8_e4m3fn or int8; scales per token, per group or given",
        launcher=_run_quant,
        reference=_reference_quant,
        tolerance="norm_quantize",
        cases=(
            *(_case((3, 577), _FP32, quant=quant) for quant in (FP8, INT8, _FP8_STATIC, _INT8_STATIC)),
            *(_case((2, 1152), t, quant=FP8_GROUPS) for t in (_BF16, _FP32)),
            _case((2, 1152), _BF16, "gelu_tanh", quant=INT8, sliced=True),
            _case((2, 1152), _BF16, "relu2", gated=False, quant=_FP8_STATIC),
            _case((0, 128), _BF16, quant=FP8_GROUPS),
            _case((1, 300), _FP16, "gelu", quant=FP8),
        ),
        signatures=(
            _case((64, 14336), _BF16, quant=FP8),
            _case((64, 28672), _BF16, quant=INT8),
            _case((64, 18432), _BF16, quant=FP8_GROUPS),
            _case((64, 14336), _FP16, "gelu_tanh", quant=_FP8_STATIC),
            _case((64, 9216), _BF16, "relu2", gated=False, quant=_INT8_STATIC),
        ),
        faults=(
            Fault("y *= tl.load", "y += tl.load"),
            Fault("tile_offsets(block, GROUP, BLOCK)", "tile_offsets(0, GROUP, BLOCK)"),
            Fault("offsets < SIZE", "offsets < SIZE - 1"),
            Fault("wide = y.to(tl.float32)", "wide = y.to(tl.float32) * 1.02"),
        ),
    ),
)
