"""8-bit weights laid out for the Triton kernel (kernels/gpu/scaled_matmul.py): W8A8 int8, and FP8.

Imports triton, so it is imported where that is installed only.
"""

import torch

from halimede.engine.quant.canonical import Fp8Weight, Int8Weight
from halimede.engine.quant.forms.base import (
    ActivationQuant,
    Activations,
    Placement,
    QuantizedActivations,
    WeightForm,
)
from halimede.kernels.gpu.quantize import per_token_quant
from halimede.kernels.gpu.scaled_config import ROW_BUCKETS
from halimede.kernels.gpu.scaled_matmul import scaled_matmul
from halimede.kernels.gpu.scaled_operand import (
    GROUP,
    ScaledOperand,
    fp8_kind,
    fp8_operand,
    int8_operand,
    supports_block,
)
from halimede.kernels.launch import target_of
from halimede.kernels.matmul_int8 import quantize_static, quantize_tokens


class _Scaled(WeightForm):
    """What both have in common. `_quantized` gives codes, scales and zeros of activations as they are."""

    codes: torch.Tensor
    scales: torch.Tensor
    sums: torch.Tensor | None
    counters: torch.Tensor
    static_scale: torch.Tensor | None

    def _take(self, operand: ScaledOperand) -> None:
        self._scaling = operand.scaling
        for name in ("codes", "scales", "sums", "counters"):
            self._hold(name, getattr(operand, name))

    @property
    def row_buckets(self) -> tuple[int, ...]:
        """See WeightForm."""
        return ROW_BUCKETS[:-1]

    def take_bias(self, bias: torch.Tensor) -> bool:
        """See WeightForm."""
        self._hold("bias", bias)
        return True

    def forward(self, x: Activations) -> torch.Tensor:
        """See WeightForm."""
        if isinstance(x, QuantizedActivations):
            return self._product(x.codes, x.scales, None, x.dtype)
        return self._product(*self._quantized(x), x.dtype)

    def _quantized(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        quant = self.quantizes
        if quant is None:
            return x, None, None
        codes, scales = per_token_quant(x, quant.dtype, quant.group_size, quant.scale)
        return codes, scales, None

    def _product(
        self, x: torch.Tensor, scales: torch.Tensor | None, zeros: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        operand = ScaledOperand(self.codes, self.scales, self.sums, self.counters, self._scaling)
        return scaled_matmul(x, scales, operand, self.bias, dtype=dtype, zeros=zeros)


class KernelW8A8(_Scaled):
    """An Int8Weight. Activations that have zero points are rounded by torch."""

    static_zeros: torch.Tensor

    def __init__(self, weight: Int8Weight, placement: Placement) -> None:
        super().__init__(weight.shape, placement)
        self._symmetric, self._static_zero = weight.symmetric, weight.static_zero
        self._hold("static_scale", weight.static_scale)
        self._has_zeros = not weight.symmetric or weight.static_zero != 0
        self._hold("static_zeros", torch.full((1,), weight.static_zero, dtype=torch.int32))
        codes, scales = weight.weight.to(placement.device), weight.scales.to(placement.device)
        self._take(int8_operand(codes, scales, has_sums=self._has_zeros))

    @property
    def quantizes(self) -> ActivationQuant | None:
        """See WeightForm."""
        return None if self._has_zeros else ActivationQuant(torch.int8, scale=self.static_scale)

    def _quantized(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if not self._has_zeros:
            return super()._quantized(x)
        if self.static_scale is not None:
            codes = quantize_static(x, self.static_scale, self._static_zero)
            return codes, self.static_scale, self.static_zeros
        codes, scales, zeros = quantize_tokens(x, symmetric=self._symmetric)
        assert isinstance(zeros, torch.Tensor), "asymmetric codes have a zero for each token"
        return codes, scales.reshape(-1), zeros.reshape(-1).to(torch.int32)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """See WeightForm."""
        return self.codes[ids].float() * self.scales[ids][:, None]


class KernelFP8(_Scaled):
    """An Fp8Weight. Where no FP8 is multiplied activations stay as they are."""

    def __init__(self, weight: Fp8Weight, placement: Placement) -> None:
        super().__init__(weight.shape, placement)
        self._hold("static_scale", weight.static_scale)
        codes, scales = weight.weight.to(placement.device), weight.scales.to(placement.device)
        self._take(fp8_operand(codes, scales, weight.block, fp8_kind(target_of(codes))))

    @property
    def quantizes(self) -> ActivationQuant | None:
        """See WeightForm."""
        if self._scaling.kind == "wide":
            return None
        if self._scaling.block is not None:
            return ActivationQuant(torch.float8_e4m3fn, GROUP)
        return ActivationQuant(torch.float8_e4m3fn, scale=self.static_scale)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """See WeightForm."""
        values = self.codes.view(torch.uint8)[ids].view(torch.float8_e4m3fn).float()
        block = self._scaling.block
        if block is None:
            return values * self.scales[ids][:, None]
        scales = self.scales[ids // block[0]].repeat_interleave(block[1], 1)
        return values * scales[:, : values.shape[1]]


def takes_fp8(weight: Fp8Weight, placement: Placement) -> bool:
    """Whether KernelFP8 is for a weight: its blocks suit the kernel, and its type where it is widened."""
    kind = fp8_kind(target_of(torch.empty(0, device=placement.device)))
    return supports_block(weight.block, weight.shape[1]) and (kind != "wide" or placement.dtype.itemsize == 2)
