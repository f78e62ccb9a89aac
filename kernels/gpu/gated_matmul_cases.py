"""Cases, signatures and the reference of gated_matmul."""

from typing import Any

import torch

from halimede.kernels.gpu.activation import Activation, activate_reference
from halimede.kernels.launch import Launch
from halimede.kernels.spec import Case, Tensors, Work

_BF16, _FP16 = torch.bfloat16, torch.float16


def reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation
) -> Tensors:
    """The oracle of gated_matmul: float64 inside, rounded once."""
    both = x.double() @ weight.double().t()
    if bias is not None:
        both += bias.double()
    return (activate_reference(both, activation, gated=True).to(x.dtype),)


def _case(
    name: str,
    rows: int,
    inner: int,
    size: int,
    dtype: torch.dtype,
    activation: Activation = "silu",
    *,
    bias: bool = False,
    stride: int = 0,
) -> Case:
    """inner, size: K and I. stride: between rows of x, NaN beyond K; 0: K. Gate and up are of size 1."""

    def make(device: torch.device) -> dict[str, Any]:
        x = torch.full((rows, stride or inner), float("nan"), dtype=dtype, device=device)[:, :inner]
        x.copy_(torch.randn(rows, inner, device=device))
        weight = torch.randn(2 * size, inner, device=device) * inner**-0.5
        offsets = torch.randn(2 * size, device=device).to(dtype) if bias else None
        return {"x": x, "weight": weight.to(dtype), "bias": offsets, "activation": activation}

    moved = 2 * size * (inner + bias) + rows * (inner + size)
    return Case(name, make, Work(bytes=moved * dtype.itemsize, flops=4 * rows * size * inner))


def case_of(launch: Launch) -> Case:
    """With the shapes of a launch of the kernel."""
    x, _, bias = launch.args[:3]
    rows, inner = x.shape
    size, activation = launch.constants["SIZE"], launch.constants["ACTIVATION"]
    stride = x.stride(0) if rows > 1 and x.stride(0) != inner else 0
    name = f"{rows} x {inner} to {size}, {str(x.dtype).removeprefix('torch.')}, {activation}"
    name += (", bias" if bias is not None else "") + (f", rows {stride} apart" if stride else "")
    return _case(name, rows, inner, size, x.dtype, activation, bias=bias is not None, stride=stride)


CASES = (
    _case("a row, bias", 1, 200, 70, _BF16, bias=True),
    _case("a row, gelu_tanh", 1, 300, 64, _FP16, "gelu_tanh"),
    _case("whole blocks", 3, 256, 32, _FP16),
    _case("whole blocks, gelu_tanh", 3, 192, 96, _BF16, "gelu_tanh", bias=True),
    _case("odd K and I", 16, 37, 33, _FP16),
    _case("odd K and I, gelu_tanh", 17, 131, 45, _BF16, "gelu_tanh", bias=True),
    _case("strided rows", 33, 120, 40, _FP16, bias=True, stride=160),
    _case("rows of an odd stride", 3, 64, 32, _BF16, stride=77),
    _case("wide blocks", 2, 40, 12701, _BF16),
    _case("one element", 1, 1, 1, _FP16, bias=True),
    _case("no row", 0, 40, 24, _BF16),
)

SIGNATURES = (
    _case("Llama 3 8B, 1 row", 1, 4096, 14336, _BF16),
    _case("Llama 3 8B, 16 rows", 16, 4096, 14336, _BF16),
    _case("Qwen 2 0.5B, 8 rows, bias", 8, 896, 4864, _FP16, bias=True),
    _case("Gemma 3 4B, 16 rows", 16, 2560, 10240, _BF16, "gelu_tanh"),
)
