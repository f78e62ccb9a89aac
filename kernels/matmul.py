"""Products with a weight matrix, y = x W^T + b, on a CPU: weights laid out once so that every step is fast.

Layouts: x (M, K), W [N, K] as checkpoints store it, b (N), y (M, N). Moves N * K weights per call, which is
what decoding with few rows waits for.

torch's own `F.linear` hands oneDNN the weight as it is, and oneDNN reorders it into its blocked layout in
every call: half of the time at M = 8. A weight reordered once is twice as fast from 2 rows up, in float32 and
bfloat16 alike. For one row of bfloat16 oneDNN, reordered or not, is slower than torch's own dot products over
the plain weight, so 16-bit weights are kept both ways; docs/perf-log.md has the figures.

A CPU without arithmetic in a 16-bit type emulates it many times slower than float32. There x, y and the
reordered weight are float32 and only the plain weight, which one row reads, is of 16 bits.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

# Elements of a weight that are widened at once: 4 MiB of float32, still in the cache when they are used.
_WIDENED_ELEMENTS = 1 << 20


def matmul_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The oracle of matmul: float64 inside."""
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double()).to(x.dtype)


def pack_weight(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """A weight [N, K] in oneDNN's layout for x of `dtype`, opaque to torch's other operations.

    None where oneDNN has none for it: it is not there, or dtype is float16.
    """
    if dtype not in (torch.float32, torch.bfloat16) or not torch._C._has_mkldnn:
        return None
    try:
        # The hint (rows of x) chooses among layouts that differ little; one must serve decode and prefill.
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), 16)
    except (AttributeError, NotImplementedError, RuntimeError):  # a build of torch or a CPU without it
        return None
    return packed


def matmul(
    x: torch.Tensor, packed: torch.Tensor | None, plain: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """(M, K) -> (M, N), by one weight in up to two forms; bias (N) is of x's dtype.

    packed: what pack_weight made for x's dtype; None takes the plain weight for any number of rows.
    plain: the weight [N, K] itself, for one row; None where packed serves that too.
    """
    if packed is None or (plain is not None and x.shape[0] == 1):
        assert plain is not None, "a product needs the weight in one form at least"
        return _plain_product(x, plain, bias)
    if torch._C._is_tracing():
        return _recordable_product()(x, packed, bias)
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def _plain_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """By the weight [N, K] as it is, of x's dtype or narrower."""
    if x.shape[0] > 1:
        if x.dtype == weight.dtype:
            return F.linear(x, weight, bias)
        return _widened_product(x, weight, bias)
    with plain_products():
        if x.dtype == weight.dtype:
            return F.linear(x, weight, bias)
        y = F.linear(x.to(weight.dtype), weight).to(x.dtype)
    return y if bias is None else y.add_(bias)


def _widened_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """By a weight that is widened to x's dtype piece by piece, so that it is never there twice."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    rows = max(1, _WIDENED_ELEMENTS // weight.shape[1])
    for first in range(0, weight.shape[0], rows):
        piece = slice(first, first + rows)
        torch.mm(x, weight[piece].to(x.dtype).t(), out=y[:, piece])
    return y if bias is None else y.add_(bias)


@functools.cache
def _recordable_product() -> Callable[..., torch.Tensor]:
    """oneDNN's product as TorchScript: tracing cannot record the type of one of its arguments."""
    graph = torch._C.parse_ir(
        """graph(%x : Tensor, %packed : Tensor, %bias : Tensor?):
            %none : str = prim::Constant[value="none"]()
            %algorithm : str = prim::Constant[value=""]()
            %scalars : Scalar?[] = prim::ListConstruct()
            %y : Tensor = mkldnn::_linear_pointwise(%x, %packed, %bias, %none, %scalars, %algorithm)
            return (%y)"""
    )
    function: Callable[..., torch.Tensor] = torch._C._create_function_from_graph("packed_product", graph)
    return function


@contextmanager
def plain_products() -> Iterator[None]:
    """torch's own products in place of oneDNN's. The switch is the process's, so it is put back at once."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)
