"""Products of int8 activations with int8 weights: y = (codes(x) W^T) * scale(x) * scale(W), W8A8.

Activations are rounded to int8 as compressed-tensors does: x / scale + zero, to nearest even, in -128..127. A
dynamic scale is a token's own: its largest magnitude / 127.5 or, with a zero point, its range with 0 / 255.
The zero point comes off as zero * (sum of the row of W), computed once. On a CPU the sums are exact int32
(torch._int_mm, VNNI); elsewhere they are products of float32, rounded beyond 2^24.

Source: compressed-tensors, quantization/utils/helpers.py (calculate_qparams) and lifecycle/forward.py.

Layouts: x (M, K), codes (M, K) int8, W [N, K] int8, scales (N), sums (N) int32, y (M, N).
"""

import torch

_LOWEST, _HIGHEST = -128, 127
_TINY = float(torch.finfo(torch.float32).eps)


def quantize_tokens(x: torch.Tensor, *, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes (M, K) int8, scales (M, 1) float32, zeros (M, 1) float32) of x (M, K), each token on its own."""
    wide = x.float()
    lowest, highest = wide.amin(1, keepdim=True).clamp(max=0), wide.amax(1, keepdim=True).clamp(min=0)
    if symmetric:
        scales = torch.maximum(-lowest, highest) / (float(_HIGHEST - _LOWEST) / 2)
        scales = scales.to(x.dtype).float().clamp_(min=_TINY)
        return _rounded(wide / scales), scales, torch.zeros_like(scales)
    scales = ((highest - lowest) / float(_HIGHEST - _LOWEST)).to(x.dtype).float().clamp_(min=_TINY)
    zeros = (_LOWEST - lowest / scales).round_().clamp_(_LOWEST, _HIGHEST)
    return _rounded(wide / scales + zeros), scales, zeros


def quantize_static(x: torch.Tensor, scale: torch.Tensor, zero: int) -> torch.Tensor:
    """Codes (M, K) int8 of x (M, K) with one scale (1) for all."""
    return _rounded(x.float() / scale + zero)


def _rounded(values: torch.Tensor) -> torch.Tensor:
    return values.round_().clamp_(_LOWEST, _HIGHEST).to(torch.int8)


def int8_product(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Sums (M, N) of codes (M, K) times W [N, K]: int32 on a CPU, float32 elsewhere."""
    if codes.device.type == "cpu":
        return torch._int_mm(codes, weight.t())
    return codes.float() @ weight.t().float()
