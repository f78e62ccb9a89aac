"""Products with a weight of integer codes on a GPU, whatever their number of rows: y = x W^T.

Up to DEQUANTIZE_ROWS rows the codes are multiplied as they are (gpu/wna16_matmul.py). Prompts of more rows
are bound by arithmetic: the weight is written out in 16 bits and multiplied by cuBLAS or hipBLASLt.
"""

import torch

from halimede.kernels.gpu import wna16_config
from halimede.kernels.gpu.activation import activate
from halimede.kernels.gpu.wna16_dequantize import wna16_dequantize
from halimede.kernels.gpu.wna16_layout import WNA16Operand
from halimede.kernels.gpu.wna16_matmul import GatedActivation, wna16_matmul

DEQUANTIZE_ROWS = 512
"""More rows than these are multiplied with the weight written out: from there on that is faster on an H100
for Llama-3-8B's shapes (docs/perf-log.md)."""

ROW_BUCKETS = (*(bucket for bucket in wna16_config.ROW_BUCKETS if bucket < DEQUANTIZE_ROWS), DEQUANTIZE_ROWS)
"""Numbers of rows up to which one and the same is launched; so it is for all that are more."""


def wna16_product(
    x: torch.Tensor,
    weight: WNA16Operand,
    bias: torch.Tensor | None = None,
    *,
    activation: GatedActivation | None = None,
) -> torch.Tensor:
    """x (M, K) of 16 bits to x W^T + bias, (M, N) of x's type; of a gated operand act(gate) * up, (M, N / 2).

    bias: (N), none for gated operands.
    """
    if x.shape[0] <= DEQUANTIZE_ROWS:
        return wna16_matmul(x, weight, bias, activation=activation)
    plain = wna16_dequantize(weight, x.dtype)
    # For a product of meta tensors this torch would import sympy.
    y = x.new_empty(x.shape[0], plain.shape[0]) if x.is_meta else torch.nn.functional.linear(x, plain, bias)
    return y if activation is None else activate(y, activation, gated=True)
