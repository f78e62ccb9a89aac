"""Cases, signatures and references of wna16_matmul and wna16_dequantize."""

from typing import Any

import torch

from halimede.kernels.gpu.activation import Activation, activate_reference
from halimede.kernels.gpu.wna16_layout import Facts, WNA16Operand, pack_wna16, rows_of
from halimede.kernels.launch import Launch, target_of
from halimede.kernels.spec import Case, Tensors, Work

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32


def operand_of(
    codes: torch.Tensor,
    bits: int,
    group_size: int,
    scales: torch.Tensor,
    zero: torch.Tensor | int,
    offsets: torch.Tensor | None,
    table: torch.Tensor | None,
    *,
    gated: bool = False,
) -> WNA16Operand:
    """The weight laid out for the device that it is on, or is compiled for."""
    backend = target_of(codes).backend
    return pack_wna16(codes, bits, group_size, scales, zero, offsets, table, backend=backend, gated=gated)


def plain_weight(
    codes: torch.Tensor,
    bits: int,
    group_size: int,
    scales: torch.Tensor,
    zero: torch.Tensor | int,
    offsets: torch.Tensor | None,
    table: torch.Tensor | None,
) -> torch.Tensor:
    """What the codes stand for: [N, K] float64."""
    grouped = codes.view(codes.shape[0], -1, group_size)
    if table is not None:
        values = table.double()[grouped.int()]
    else:
        values = grouped.double() - (zero.double()[..., None] if isinstance(zero, torch.Tensor) else zero)
    values = values * scales.double()[..., None]
    if offsets is not None:
        values = values + offsets.double()[..., None]
    return values.reshape(codes.shape)


def _plain_operand(weight: WNA16Operand) -> torch.Tensor:
    """plain_weight of one that is laid out; gate's rows are above up's again."""
    rows = rows_of(weight, torch.arange(weight.facts.shape[0], device=weight.words.device)).double()
    if not weight.facts.gated:
        return rows
    return rows.view(-1, 2, 8, rows.shape[1]).transpose(0, 1).reshape(rows.shape)


def reference(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    activation: Activation | None,
    deterministic: bool,
    weight: WNA16Operand | None = None,
    **canonical: Any,
) -> Tensors:
    """The oracle of wna16_matmul: float64 inside, rounded once. weight: in place of what it is made of."""
    plain = plain_weight(**canonical) if weight is None else _plain_operand(weight)
    y = x.double() @ plain.t()
    if bias is not None:
        y += bias.double()
    if activation is not None:
        y = activate_reference(y, activation, gated=True)
    return (y.to(x.dtype),)


def dequantize_reference(dtype: torch.dtype, gated: bool = False, **canonical: Any) -> Tensors:
    """The oracle of wna16_dequantize."""
    return (plain_weight(**canonical).to(dtype),)


def _canonical(
    size: int,
    inner: int,
    bits: int,
    group: int,
    scale_dtype: torch.dtype,
    kinds: str,
    device: torch.device,
    plain_zero: int | None = None,
) -> dict[str, Any]:
    """kinds: words of "zeros", "offsets", "table", for what each group has or all codes go through.

    plain_zero: of all codes, where groups have none; None: their middle.
    """
    groups = (size, inner // group)
    zero: torch.Tensor | int = 1 << (bits - 1) if plain_zero is None else plain_zero
    if "zeros" in kinds:
        zero = torch.randint(0, 1 << bits, groups, device=device).float()
    scales = (torch.rand(groups, device=device) + 0.5) * inner**-0.5 * 2.0 ** (1 - bits)
    offsets = torch.randn(groups, device=device) * inner**-0.5 if "offsets" in kinds else None
    return {
        "codes": torch.randint(0, 1 << bits, (size, inner), dtype=torch.uint8, device=device),
        "bits": bits,
        "group_size": group,
        "scales": scales.to(scale_dtype),
        "zero": zero,
        "offsets": None if offsets is None else offsets.to(scale_dtype),
        "table": torch.randn(1 << bits, device=device) * (1 << (bits - 1)) if "table" in kinds else None,
    }


def _case(
    name: str,
    rows: int,
    inner: int,
    size: int,
    bits: int = 4,
    group: int = 128,
    dtype: torch.dtype = _BF16,
    kinds: str = "",
    *,
    scale_dtype: torch.dtype | None = None,
    zero: int | None = None,
    bias: bool = False,
    activation: Activation | None = None,
    stride: int = 0,
    deterministic: bool = False,
    laid_out: bool = False,
) -> Case:
    """size: N. zero: as _canonical's plain_zero. stride: between rows of x, NaN beyond K; 0: K.

    laid_out: make the operand, as when it is loaded.
    """
    scales_like = scale_dtype or dtype

    def make(device: torch.device) -> dict[str, Any]:
        x = torch.full((rows, stride or inner), float("nan"), dtype=dtype, device=device)[:, :inner]
        x.copy_(torch.randn(rows, inner, device=device))
        canonical = _canonical(size, inner, bits, group, scales_like, kinds, device, zero)
        if laid_out:
            canonical = {"weight": operand_of(**canonical, gated=activation is not None)}
        return {
            "x": x,
            "bias": torch.randn(size, device=device).to(dtype) if bias else None,
            "activation": activation,
            "deterministic": deterministic,
            **canonical,
        }

    stored = size * inner * (4 if bits <= 4 else 8) // 8
    moved = stored + size * inner // group * scales_like.itemsize + rows * (inner + size) * dtype.itemsize
    return Case(name, make, Work(bytes=moved, flops=2 * rows * size * inner))


def facts_of(launch: Launch) -> Facts:
    """Of the weight of a launch of the kernel."""
    given = launch.constants
    return Facts(
        shape=(given["SIZE"], given["INNER"]),
        bits=given["BITS"],
        group_size=given["GROUP"],
        zero=given["ZERO"],
        has_zeros=given["HAS_ZEROS"],
        has_offsets=given["HAS_OFFSETS"],
        has_table=launch.args[3] is not None,
        backend="hip" if given["HIP"] else "cuda",
        gated=given["ACTIVATION"] is not None,
    )


def case_of(launch: Launch) -> Case:
    """With the shapes of a launch of the kernel that is not deterministic: no table has those."""
    x, _, records, _, bias = launch.args[:5]
    facts, activation, (rows, inner) = facts_of(launch), launch.constants["ACTIVATION"], x.shape
    stride = x.stride(0) if rows > 1 and x.stride(0) != inner else 0
    kinds = [("zeros", facts.has_zeros), ("offsets", facts.has_offsets), ("table", facts.has_table)]
    held = " ".join(kind for kind, is_held in kinds if is_held)
    types = " scales ".join(str(dtype).removeprefix("torch.") for dtype in (x.dtype, records.dtype))
    words = [f"{rows} x {inner} to {facts.shape[0]}", f"{facts.bits} bits in {facts.group_size}", types]
    words += [word for word in (held, activation, "bias" if bias is not None else "") if word]
    return _case(
        ", ".join(words) + (f", rows {stride} apart" if stride else ""),
        rows,
        inner,
        facts.shape[0],
        facts.bits,
        facts.group_size,
        x.dtype,
        held,
        scale_dtype=records.dtype,
        zero=facts.zero,
        bias=bias is not None,
        activation=activation,
        stride=stride,
        laid_out=True,
    )


def _dequantize_case(
    name: str,
    inner: int,
    size: int,
    bits: int = 4,
    group: int = 128,
    dtype: torch.dtype = _BF16,
    kinds: str = "",
    *,
    scale_dtype: torch.dtype | None = None,
    laid_out: bool = False,
    gated: bool = False,
) -> Case:
    def make(device: torch.device) -> dict[str, Any]:
        canonical = _canonical(size, inner, bits, group, scale_dtype or dtype, kinds, device)
        if laid_out:
            return {"dtype": dtype, "weight": operand_of(**canonical, gated=gated)}
        return {"dtype": dtype, **canonical, **({"gated": True} if gated else {})}

    return Case(name, make, Work(bytes=size * inner * (4 if bits <= 4 else 8) // 8 + 2 * size * inner))


CASES = (
    _case("a row, 4 bits", 1, 256, 128),
    _case("3 rows, zeros, odd N", 3, 384, 75, kinds="zeros", bias=True),
    _case("16 rows, groups of 64", 16, 256, 64, group=64, kinds="zeros"),
    _case("17 rows, groups of 32", 17, 256, 72, group=32, dtype=_FP16),
    _case("3 rows, groups of 16", 3, 208, 64, group=16, kinds="zeros"),
    _case("3 rows, a group for each row", 3, 200, 64, group=200, dtype=_FP16, bias=True),
    _case("3 rows, groups of 256", 3, 512, 64, group=256),
    _case("64 rows, K split", 64, 2048, 64),
    _case("130 rows", 130, 256, 130),
    _case("130 rows, float16, zeros, K of no whole unit", 130, 320, 64, group=64, dtype=_FP16, kinds="zeros"),
    _case("8 bits", 3, 256, 64, 8),
    _case("8 bits, zeros, groups of 64", 16, 256, 64, 8, 64, kinds="zeros"),
    _case("8 bits, float16, groups of 32", 17, 128, 64, 8, 32, _FP16, kinds="zeros"),
    _case("8 bits, float16, groups of 128", 1, 256, 64, 8, 128, _FP16),
    _case("6 bits, groups of 16, float32 scales", 3, 256, 64, 6, 16, scale_dtype=_FP32),
    _case("offsets, groups of 32", 3, 256, 64, 4, 32, kinds="offsets", scale_dtype=_FP32),
    _case("offsets, 5 bits, groups of 32", 130, 128, 64, 5, 32, _FP16, kinds="offsets"),
    _case("scales of another type, 130 rows", 130, 256, 64, scale_dtype=_FP16, group=64),
    _case("a table", 3, 256, 64, 4, 64, kinds="table", scale_dtype=_FP32),
    _case("a table, float16", 17, 128, 64, 4, 32, _FP16, kinds="table"),
    _case("gate and up", 3, 256, 128, activation="silu"),
    _case("gate and up, K split, gelu_tanh", 3, 2048, 96, activation="gelu_tanh", dtype=_FP16),
    _case("rows of an odd stride", 3, 128, 64, stride=141),
    _case("rows apart", 33, 128, 64, stride=160),
    _case("deterministic", 3, 2048, 64, deterministic=True),
    _case("deterministic, 130 rows", 130, 2048, 64, deterministic=True),
    _case("no row", 0, 128, 64),
)

SIGNATURES = (
    _case("Llama 3 8B, q k v, 1 row", 1, 4096, 6144, laid_out=True),
    _case("Llama 3 8B, o, 16 rows, zeros", 16, 4096, 4096, kinds="zeros", laid_out=True),
    _case("Llama 3 8B, gate and up, 1 row", 1, 4096, 28672, activation="silu", laid_out=True),
    _case("Llama 3 8B, down, 64 rows", 64, 14336, 4096, laid_out=True),
    _case("Llama 3 8B, down, 256 rows", 256, 14336, 4096, laid_out=True),
    _case("8 bits, groups of 128, 16 rows", 16, 4096, 4096, 8, laid_out=True),
    _case("Q4_K, 16 rows", 16, 4096, 4096, 4, 32, kinds="offsets", scale_dtype=_FP32, laid_out=True),
    _case("NF4, 16 rows, float16", 16, 4096, 4096, 4, 64, _FP16, kinds="table", laid_out=True),
)

DEQUANTIZE_CASES = (
    _dequantize_case("4 bits, odd N", 256, 70),
    _dequantize_case("K of no whole unit, zeros", 200, 64, 4, 40 * 5, kinds="zeros"),
    _dequantize_case("groups of 16, offsets", 256, 64, 6, 16, _FP16, "offsets", scale_dtype=_FP32),
    _dequantize_case("groups of 32, 8 bits", 256, 128, 8, 32, scale_dtype=_FP16),
    _dequantize_case("groups of 256, two row blocks", 512, 128, 4, 256),
    _dequantize_case("a table, groups of 64", 256, 64, 4, 64, kinds="table"),
    _dequantize_case("gate and up", 128, 96, gated=True),
)

DEQUANTIZE_SIGNATURES = (
    _dequantize_case("Llama 3 8B, down", 14336, 4096, laid_out=True),
    _dequantize_case("Llama 3 8B, gate and up", 4096, 28672, laid_out=True, gated=True),
    _dequantize_case("Q4_K", 4096, 4096, 4, 32, kinds="offsets", scale_dtype=_FP32, laid_out=True),
)
