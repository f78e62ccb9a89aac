"""Products of int8 activations with int8 weights: y = (codes(x) W^T) * scale(x) * scale(W), W8A8.

Activations are rounded to int8 as compressed-tensors does in float32, whatever the type of x: x / scale +
zero, to nearest even, in -128..127. A dynamic scale is a token's own: its largest magnitude / 127.5 or, with
a zero point, its range with 0 / 255. The zero point comes off as zero * (sum of the row of W), computed once.
On a CPU the sums are exact int32 (torch._int_mm, VNNI); elsewhere they are products of float32, rounded
beyond 2^24.

Source: compressed-tensors, quantization/utils/helpers.py (calculate_qparams) and lifecycle/forward.py.

Layouts: x (M, K), codes (M, K) int8, W [N, K] int8, scales (N), sums (N) int32, y (M, N).
"""

import torch

_LOWEST, _HIGHEST = -128, 127
_INSTEAD_OF_ZERO = float(torch.finfo(torch.float32).eps)


def quantize_tokens(x: torch.Tensor, *, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes (M, K) int8, scales (M, 1) float32, zeros (M, 1) float32) of x (M, K), each token on its own."""
    wide = x.float()
    lowest, highest = wide.amin(1, keepdim=True).clamp(max=0), wide.amax(1, keepdim=True).clamp(min=0)
    if symmetric:
        scales = torch.maximum(-lowest, highest) / (float(_HIGHEST - _LOWEST) / 2)
        scales = scales.masked_fill_(scales == 0, _INSTEAD_OF_ZERO)
        return _rounded(wide / scales), scales, torch.zeros_like(scales)
    scales = (highest - lowest) / float(_HIGHEST - _LOWEST)
    # A token of zeros has the zero 0 / 0, which becomes 0.
    zeros = (_LOWEST - lowest / scales).nan_to_num_(0.0).clamp_(_LOWEST, _HIGHEST).round_()
    scales = scales.masked_fill_(scales == 0, _INSTEAD_OF_ZERO)
    return _rounded(wide / scales + zeros), scales, zeros


def quantize_static(x: torch.Tensor, scale: torch.Tensor, zero: int) -> torch.Tensor:
    """Codes (M, K) int8 of x (M, K) with one scale (1) for all."""
    return _rounded(x.float() / scale + zero)


def _rounded(values: torch.Tensor) -> torch.Tensor:
    return values.round_().clamp_(_LOWEST, _HIGHEST).to(torch.int8)


def int8_product(
    codes: torch.Tensor, weight: torch.Tensor, zeros: torch.Tensor | int = 0, sums: torch.Tensor | None = None
) -> torch.Tensor:
    """Sums (M, N) float32 of codes (M, K) less their zeros, one or (M, 1), times W [N, K].

    sums: of the rows of W, None where all zeros are 0. On a CPU exact in int32 for K up to 65,000.
    """
    if codes.device.type == "cpu" and codes.shape[1] == 1:
        y = codes.int() * weight.t().int()  # torch 2.13's _int_mm adds one product to what memory held
    elif codes.device.type == "cpu":
        y = torch._int_mm(codes, weight.t())
    else:
        y = codes.float() @ weight.t().float()
    if sums is not None:
        y -= (zeros.to(y.dtype) if isinstance(zeros, torch.Tensor) else zeros) * sums.to(y.dtype)
    return y.float()
