"""Oracle and cases of quantized activations, and how their codes are compared.

A code is an integer that grows with its value: int8 itself, or float8's magnitude bits with its sign. The
reference gives the place of the unrounded value between two of them, so a code that was rounded right is
within one half of it, plus what the roundings before it move the value.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from halimede.kernels.spec import Case, Tensors, Work

SMALLEST_SCALE = 2.0**-100


@dataclass(frozen=True, slots=True)
class Quant:
    """How a case quantizes. static: the scale to give, 0 for dynamic ones."""

    dtype: torch.dtype
    group_size: int | None = None
    static: float = 0.0

    def __str__(self) -> str:
        kind = f"scale {self.static}" if self.static else f"groups of {self.group_size or 'a row'}"
        return f"{self.dtype}, {kind}".removeprefix("torch.")

    def arguments(self, device: torch.device) -> dict[str, Any]:
        """The keyword arguments of a launcher."""
        scale = torch.full((1,), self.static, device=device) if self.static else None
        return {"dtype": self.dtype, "group_size": self.group_size, "scale": scale}


FP8, INT8 = Quant(torch.float8_e4m3fn), Quant(torch.int8)
FP8_GROUPS = Quant(torch.float8_e4m3fn, group_size=128)


def static(dtype: torch.dtype, scale: float) -> Quant:
    """One given scale."""
    return Quant(dtype, static=scale)


def code_positions(output: Tensors) -> Tensors:
    """(codes, scales) as what quantize_reference returns."""
    codes, scales = output
    if codes.dtype == torch.int8:
        return codes.double(), scales
    bits = codes.view(torch.uint8).int()
    magnitude = (bits & 0x7F).double()
    return torch.where(bits > 0x7F, -magnitude, magnitude), scales


def quantize_reference(
    y: torch.Tensor,
    dtype: torch.dtype,
    group_size: int | None = None,
    scale: torch.Tensor | None = None,
) -> Tensors:
    """(positions of y (T, hidden) among the codes, float64; scales float32), in float64."""
    largest = 448 if dtype == torch.float8_e4m3fn else 127
    columns = group_size or y.shape[1]
    groups = y.double().reshape(y.shape[0], y.shape[1] // columns, columns)
    if scale is None:
        wide = (groups.abs().amax(-1, keepdim=True) / largest).clamp(min=SMALLEST_SCALE)
        scales = wide.squeeze(-1).float() if group_size else wide.flatten().float()
    else:
        wide, scales = scale.double(), scale
    scaled = (groups / wide).reshape(y.shape)
    if dtype == torch.int8:
        return scaled.clamp(-128, 127), scales
    return _e4m3_positions(scaled.clamp(-448, 448)), scales


def _e4m3_positions(values: torch.Tensor) -> torch.Tensor:
    """Where values lie among the codes of float8_e4m3fn: 8 codes from one power of two to the next."""
    _, exponent = torch.frexp(values)
    # Below 2^-6 codes are evenly spaced; of 0, frexp gives an exponent of its own.
    exponent = torch.where(values == 0, -6, (exponent - 1).clamp(min=-6))
    steps = values.abs() * torch.exp2(3.0 - exponent.double())
    return torch.copysign(steps + 8 * (exponent + 6), values)


def quant_case(
    name: str,
    make: Callable[[torch.device], dict[str, Any]],
    quant: Quant,
    shape: tuple[int, int],
    elements_moved: int,
    dtype: torch.dtype,
    *,
    compared: bool,
) -> Case:
    """A case of a launcher with quantized output (T, size).

    make: its other arguments. elements_moved: of `dtype`. compared: give the launcher's codes as positions.
    """

    def make_all(device: torch.device) -> dict[str, Any]:
        return {**make(device), **quant.arguments(device), "compared": compared}

    num_codes = shape[0] * shape[1]
    work = Work(bytes=elements_moved * dtype.itemsize + num_codes, flops=4 * num_codes)
    return Case(f"{name}; {quant}", make_all, work)
