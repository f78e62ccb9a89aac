"""8-bit weights as scaled_matmul.py multiplies them, and what a target multiplies."""

from dataclasses import dataclass
from typing import Literal

import torch

from halimede.kernels.target import Target

Kind = Literal["int8", "fp8", "fnuz", "wide"]
GROUP = 128
"""Columns of a scale of the activations, where weights are scaled in blocks."""

_ACTIVATIONS = {
    "int8": (torch.int8,),
    "fp8": (torch.float8_e4m3fn,),
    "fnuz": (torch.uint8,),
    "wide": (torch.bfloat16, torch.float16),
}


@dataclass(frozen=True, slots=True)
class Scaling:
    """What of a weight changes the kernel. block: rows and columns of a scale; None: one for each row."""

    shape: tuple[int, int]
    kind: Kind
    block: tuple[int, int] | None = None
    has_sums: bool = False

    @property
    def key(self) -> str:
        """What a tuned entry is found by, with the type of the activations."""
        block = "row" if self.block is None else "x".join(map(str, self.block))
        return ",".join(map(str, (*self.shape, self.kind, block)))

    @property
    def activations(self) -> tuple[torch.dtype, ...]:
        """The types that the kernel takes."""
        return _ACTIVATIONS[self.kind]


@dataclass(frozen=True, slots=True)
class ScaledOperand:
    """codes: [N, K] int8, float8_e4m3fn, float8_e4m3fnuz for "fnuz", or uint8 for "wide". scales: [N]
    float32, or [N / rows, K / columns] of blocks, rounded up. sums: of the rows of codes, int32, or None.
    counters: int32, zeros, for launches that split K.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    sums: torch.Tensor | None
    counters: torch.Tensor
    scaling: Scaling


def fp8_kind(target: Target) -> Kind:
    """How a target multiplies float8_e4m3fn."""
    if target.native_e4m3:
        return "fp8"
    return "fnuz" if target.name == "gfx942" else "wide"


def int8_operand(codes: torch.Tensor, scales: torch.Tensor, *, has_sums: bool) -> ScaledOperand:
    """codes [N, K] int8, scales [N]. has_sums: for activations that have zeros."""
    scaling = Scaling((codes.shape[0], codes.shape[1]), "int8", has_sums=has_sums)
    sums = codes.sum(1, dtype=torch.int32) if has_sums else None
    return ScaledOperand(codes.contiguous(), scales.float().contiguous(), sums, _counters(codes), scaling)


def fp8_operand(
    codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], kind: Kind
) -> ScaledOperand:
    """codes [N, K] float8_e4m3fn without NaN, scales [ceil(N / block[0]), ceil(K / block[1])].

    supports_block must hold.
    """
    rows, columns = codes.shape
    in_blocks = block[1] < columns
    if in_blocks:
        scales = scales.float().contiguous()
    else:
        scales = scales.float()[:, 0].repeat_interleave(block[0])[:rows].contiguous()
    stored = codes.contiguous().view(torch.uint8)
    if kind == "fnuz":
        # -0 is NaN there; all other codes are half of what they are elsewhere.
        stored = torch.where(stored == 0x80, 0, stored).to(torch.uint8).view(torch.float8_e4m3fnuz)
    elif kind == "fp8":
        stored = stored.view(torch.float8_e4m3fn)
    scaling = Scaling((rows, columns), kind, block if in_blocks else None)
    return ScaledOperand(stored, scales, None, _counters(codes), scaling)


def supports_block(block: tuple[int, int], columns: int) -> bool:
    """Whether the kernel takes scales of such blocks: whole groups of columns, or all of them."""
    return block[1] >= columns or (block[1] % GROUP == 0 and columns % GROUP == 0)


def _counters(codes: torch.Tensor) -> torch.Tensor:
    return torch.zeros(-(-codes.shape[0] // 16), dtype=torch.int32, device=codes.device)
