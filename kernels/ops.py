"""The operations of a forward pass around attention and matrix products, in the two forms they exist in.

TORCH runs on every device; triton_ops() are the Triton kernels, for GPUs (interpreted on CPU tensors).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from halimede.kernels import activation, norm
from halimede.kernels.embedding import embed

_Tensor = torch.Tensor
_Quantized = tuple[_Tensor, ...]
Gate = Literal["silu", "gelu_tanh"]
"""What the first half of a gated product goes through."""


@dataclass(frozen=True, slots=True)
class Ops:
    """Functions of one signature whatever runs them; docstrings are in kernels/.

    rms_norm, add_rms_norm: `doubled` is for the CPU only, see kernels/norm.py. gated_matmul: gate and up of a
    gated feed-forward layer and the activation over them in one, for up to gated_rows rows of 16 bits.
    rms_norm_quant, add_rms_norm_quant, activate_quant: norm or activation (gated), and quantize the result
    in the same launch; the last arguments and (codes, scales) are those of per_token_quant. None where there
    is no such kernel.
    """

    embed: Callable[[_Tensor, _Tensor, float, torch.dtype], _Tensor]
    rms_norm: Callable[[_Tensor, _Tensor, float, _Tensor | None], _Tensor]
    add_rms_norm: Callable[[_Tensor, _Tensor, _Tensor, float, _Tensor | None], _Tensor]
    silu_and_mul: Callable[[_Tensor], _Tensor]
    gelu_tanh_and_mul: Callable[[_Tensor], _Tensor]
    gated_matmul: Callable[[_Tensor, _Tensor, _Tensor | None, Gate], _Tensor] | None = None
    gated_rows: int = 0
    rms_norm_quant: (
        Callable[[_Tensor, _Tensor, float, torch.dtype, int | None, _Tensor | None], _Quantized] | None
    ) = None
    add_rms_norm_quant: (
        Callable[[_Tensor, _Tensor, _Tensor, float, torch.dtype, int | None, _Tensor | None], _Quantized]
        | None
    ) = None
    activate_quant: Callable[[_Tensor, Gate, torch.dtype, int | None, _Tensor | None], _Quantized] | None = (
        None
    )


TORCH = Ops(
    embed=embed,
    rms_norm=norm.rms_norm,
    add_rms_norm=norm.add_rms_norm,
    silu_and_mul=activation.silu_and_mul,
    gelu_tanh_and_mul=activation.gelu_tanh_and_mul,
)


def triton_ops() -> Ops:
    """The Triton kernels; ImportError where triton is not installed."""
    from halimede.kernels.gpu.activation import activate_quant, gelu_tanh_and_mul, silu_and_mul
    from halimede.kernels.gpu.embedding import embed as gpu_embed
    from halimede.kernels.gpu.gated_matmul import MAX_ROWS, gated_matmul
    from halimede.kernels.gpu.norm import add_rms_norm, rms_norm
    from halimede.kernels.gpu.norm_quant import add_rms_norm_quant, rms_norm_quant

    return Ops(
        embed=lambda ids, weight, scale, dtype: gpu_embed(ids, weight, scale=scale, dtype=dtype),
        rms_norm=lambda x, weight, eps, doubled: rms_norm(x, weight, eps),
        add_rms_norm=lambda x, residual, weight, eps, doubled: add_rms_norm(x, residual, weight, eps),
        silu_and_mul=silu_and_mul,
        gelu_tanh_and_mul=gelu_tanh_and_mul,
        gated_matmul=lambda x, weight, bias, name: gated_matmul(x, weight, bias, activation=name),
        gated_rows=MAX_ROWS,
        rms_norm_quant=lambda x, weight, eps, dtype, group_size, scale: rms_norm_quant(
            x, weight, eps, dtype=dtype, group_size=group_size, scale=scale
        ),
        add_rms_norm_quant=lambda x, residual, weight, eps, dtype, group_size, scale: add_rms_norm_quant(
            x, residual, weight, eps, dtype=dtype, group_size=group_size, scale=scale
        ),
        activate_quant=lambda x, name, dtype, group_size, scale: activate_quant(
            x, name, gated=True, dtype=dtype, group_size=group_size, scale=scale
        ),
    )
