"""Cases, signatures and the reference of scaled_matmul."""

from typing import Any

import torch

from halimede.kernels.gpu.scaled_operand import (
    GROUP,
    ScaledOperand,
    Scaling,
    fp8_kind,
    fp8_operand,
    int8_operand,
)
from halimede.kernels.launch import Launch, target_of
from halimede.kernels.spec import Case, Tensors, Work

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_INT8, _FP8 = torch.int8, torch.float8_e4m3fn


def operand_of(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    block: tuple[int, int],
    wide: bool,
    weight: ScaledOperand | None = None,
    **rest: Any,
) -> tuple[ScaledOperand, dict[str, Any]]:
    """The weight laid out for the device that it is on, or is compiled for; and the other arguments."""
    if weight is not None:
        return weight, rest
    if codes.dtype == _INT8:
        return int8_operand(codes, scales[:, 0], has_sums=rest["zeros"] is not None), rest
    return fp8_operand(codes, scales, block, "wide" if wide else fp8_kind(target_of(x))), rest


def reference(
    x: torch.Tensor,
    x_scales: torch.Tensor | None,
    deterministic: bool,
    codes: torch.Tensor,
    scales: torch.Tensor,
    block: tuple[int, int],
    wide: bool,
    bias: torch.Tensor | None,
    zeros: torch.Tensor | None,
    dtype: torch.dtype,
    weight: None = None,
) -> Tensors:
    """The oracle: float64 inside, rounded once."""
    values = x.double() if zeros is None else x.double() - zeros.double().view(-1, 1)
    if x_scales is not None and x_scales.dim() == 2:
        values = values * x_scales.double().repeat_interleave(GROUP, 1)[:, : x.shape[1]]
    elif x_scales is not None:
        values = values * x_scales.double().view(-1, 1)
    wide_scales = scales.double().repeat_interleave(block[0], 0)[: codes.shape[0]]
    w = codes.double() * wide_scales.repeat_interleave(block[1], 1)[:, : codes.shape[1]]
    y = values @ w.t()
    return ((y if bias is None else y + bias.double()).to(dtype),)


def _case(
    name: str,
    rows: int,
    inner: int,
    size: int,
    kind: torch.dtype = _FP8,
    block: tuple[int, int] | None = None,
    dtype: torch.dtype = _BF16,
    *,
    wide: bool = False,
    static: bool = False,
    zeros: str = "",
    bias: bool = False,
    stride: int = 0,
    deterministic: bool = False,
    laid_out: bool = False,
) -> Case:
    """block: None is a scale for each row of w. static: one scale for all of x. zeros: "row" or "one"."""

    def make(device: torch.device) -> dict[str, Any]:
        blocks = block or (1, inner)
        grid = tuple(-(-length // of) for length, of in zip((size, inner), blocks, strict=True))
        given: dict[str, Any] = {
            "x": _codes((rows, stride or inner), dtype if wide else kind, device)[:, :inner],
            "x_scales": None if wide else _x_scales(rows, inner, block, static, device),
            "codes": _codes((size, inner), kind, device),
            "scales": (torch.rand(grid, device=device) + 0.5) * inner**-0.5 / (1.0 if wide else 50.0),
            "block": blocks,
            "wide": wide,
            "bias": torch.randn(size, device=device).to(dtype) if bias else None,
            "zeros": _zeros(rows, zeros, device),
            "dtype": dtype,
            "deterministic": deterministic,
        }
        if laid_out:
            given["weight"], _ = operand_of(**{k: v for k, v in given.items() if k != "x_scales"})
            if given["weight"].scaling.kind == "wide" and not wide:  # as such a target is given it
                given["x"] = given["x"].to(dtype)
                given["x_scales"] = None
        return given

    moved = size * inner + rows * inner * (2 if wide else 1) + rows * size * dtype.itemsize
    return Case(name, make, Work(bytes=moved, flops=2 * rows * size * inner))


def _codes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if dtype == _INT8:
        return torch.randint(-127, 128, shape, dtype=_INT8, device=device)
    if dtype == _FP8:
        return torch.randn(shape, device=device).mul_(40).clamp_(-448, 448).to(_FP8)
    return torch.randn(shape, device=device).to(dtype)


def _x_scales(
    rows: int, inner: int, block: tuple[int, int] | None, static: bool, device: torch.device
) -> torch.Tensor:
    grouped = block is not None and block[1] < inner
    shape = (1,) if static else (rows, -(-inner // GROUP)) if grouped else (rows,)
    return (torch.rand(shape, device=device) + 0.5) / 50.0


def _zeros(rows: int, zeros: str, device: torch.device) -> torch.Tensor | None:
    if not zeros:
        return None
    return torch.randint(-100, 100, (rows if zeros == "row" else 1,), dtype=torch.int32, device=device)


def scaling_of(launch: Launch) -> Scaling:
    """Of the weight of a launch of the kernel."""
    given = launch.constants
    block = (given["SCALE_ROWS"], given["SCALE_COLUMNS"]) if given["SCALE_COLUMNS"] else None
    return Scaling((given["SIZE"], given["INNER"]), given["KIND"], block, launch.args[5] is not None)


def case_of(launch: Launch) -> Case:
    """With the shapes of a launch of the kernel that is not deterministic: no table has those."""
    x, _, x_scales, _, zeros, _, bias, y = launch.args[:8]
    scaling, (rows, inner) = scaling_of(launch), x.shape
    stride = x.stride(0) if rows > 1 and x.stride(0) != inner else 0
    is_static = x_scales is not None and scaling.block is None and not launch.constants["SCALES_A_ROW"]
    with_zeros = "" if zeros is None else "row" if launch.constants["ZEROS_A_ROW"] else "one"
    words = [f"{rows} x {inner} to {scaling.shape[0]}", scaling.kind, str(y.dtype).removeprefix("torch.")]
    words += [f"blocks of {scaling.block[0]} x {scaling.block[1]}"] if scaling.block else []
    words += ["static"] * is_static + ([f"zeros a {with_zeros}"] if with_zeros else [])
    words += ["bias"] * (bias is not None) + ([f"rows {stride} apart"] if stride else [])
    return _case(
        ", ".join(words),
        rows,
        inner,
        scaling.shape[0],
        _INT8 if scaling.kind == "int8" else _FP8,
        scaling.block,
        y.dtype,
        wide=scaling.kind == "wide",
        static=is_static,
        zeros=with_zeros,
        bias=bias is not None,
        stride=stride,
        laid_out=True,
    )


CASES = (
    _case("int8, a row, odd N and K", 1, 200, 75, _INT8, bias=True),
    _case("int8, zeros, 3 rows", 3, 256, 64, _INT8, zeros="row"),
    _case("int8, static with a zero, 17 rows", 17, 131, 70, _INT8, static=True, zeros="one", dtype=_FP16),
    _case("int8, 130 rows, float32", 130, 384, 130, _INT8, dtype=_FP32),
    _case("int8, K split, zeros", 16, 4096, 64, _INT8, zeros="row", bias=True),
    _case("a row", 1, 256, 128),
    _case("16 rows, odd N", 16, 384, 75, bias=True),
    _case("17 rows, odd K, float16", 17, 203, 64, dtype=_FP16),
    _case("64 rows, K split", 64, 4096, 64),
    _case("130 rows, static", 130, 256, 130, static=True),
    _case("a scale for all of w", 3, 256, 64, block=(64, 256)),
    _case("blocks, 3 rows", 3, 384, 200, block=(128, 128)),
    _case("blocks, 130 rows, odd N", 130, 256, 150, block=(128, 128), bias=True),
    _case("blocks of 64 x 256", 17, 512, 130, block=(64, 256), dtype=_FP16),
    _case("wide, 3 rows", 3, 256, 70, wide=True, bias=True),
    _case("wide, 130 rows, odd K, float16", 130, 203, 64, dtype=_FP16, wide=True),
    _case("wide, blocks", 16, 256, 130, block=(128, 128), wide=True),
    _case("rows apart", 33, 128, 64, stride=160),
    _case("rows of an odd stride", 3, 128, 64, stride=141),
    _case("deterministic, 130 rows", 130, 4096, 64, deterministic=True),
    _case("300 rows", 300, 256, 128),
    _case("300 rows, int8, zeros", 300, 128, 128, _INT8, zeros="row"),
    _case("300 rows, blocks", 300, 256, 128, block=(128, 128)),
    _case("no row", 0, 128, 64),
)

SIGNATURES = (
    _case("Llama 3 8B, q k v, 1 row", 1, 4096, 6144, laid_out=True),
    _case("Llama 3 8B, gate and up, 16 rows", 16, 4096, 28672, laid_out=True),
    _case("Llama 3 8B, down, 64 rows", 64, 14336, 4096, laid_out=True),
    _case("Llama 3 8B, down, 4096 rows", 4096, 14336, 4096, laid_out=True),
    _case("blocks of 128, 16 rows", 16, 4096, 4096, block=(128, 128), laid_out=True),
    _case("blocks of 128, 4096 rows", 4096, 4096, 4096, block=(128, 128), laid_out=True),
    _case("int8, 16 rows", 16, 4096, 4096, _INT8, laid_out=True),
    _case("int8, zeros, 4096 rows", 4096, 4096, 4096, _INT8, zeros="row", laid_out=True),
    _case("wide, 16 rows", 16, 4096, 4096, wide=True, laid_out=True),
)
