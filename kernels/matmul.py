"""Products with a weight matrix, y = x W^T + b, on a CPU: weights laid out once so that every step is fast.

Layouts: x (M, K), W [N, K] as checkpoints store it, b (N), y (M, N). Moves N * K weights per call, which is
what decoding with few rows waits for.

torch's own `F.linear` hands oneDNN the weight as it is, and oneDNN reorders it into its blocked layout in
every call: half of the time at M = 8. A weight reordered once is twice as fast from 2 rows up, in float32 and
bfloat16 alike. For one row of bfloat16 oneDNN, reordered or not, is slower than torch's own dot products over
the plain weight, so 16-bit weights are kept both ways; docs/perf-log.md has the figures.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class CpuWeight:
    """A weight [N, K] as the CPU multiplies by it.

    packed: in oneDNN's layout, opaque to torch's other operations. plain: as it was, for products with one
    row; None where packed serves those too.
    """

    packed: torch.Tensor
    plain: torch.Tensor | None


def matmul_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The oracle of matmul: float64 inside."""
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double()).to(x.dtype)


def pack_weight(weight: torch.Tensor) -> CpuWeight | None:
    """Lay a weight [N, K] out for matmul; None where plain F.linear is as good: no oneDNN, or float16."""
    if weight.dtype not in (torch.float32, torch.bfloat16) or not torch._C._has_mkldnn:
        return None
    try:
        # The hint (rows of x) chooses among layouts that differ little; one must serve decode and prefill.
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
    except (AttributeError, NotImplementedError, RuntimeError):  # a build of torch or a CPU without it
        return None
    return CpuWeight(packed, weight if weight.dtype == torch.bfloat16 else None)


def matmul(x: torch.Tensor, weight: CpuWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """(M, K) -> (M, N)."""
    if x.shape[0] == 1 and weight.plain is not None:
        return _one_row(x, weight.plain, bias)
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.packed, bias, "none", [], "")
    return y


def _one_row(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear by torch's own kernels. The switch is the process's, so it is put back at once."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        return F.linear(x, weight, bias)
    finally:
        torch._C._set_mkldnn_enabled(enabled)
