"""One row times a 16-bit weight on a CPU with AVX2: y = x W^T, computed as embedding bags.

Column n of W^T times x is a weighted sum of K numbers, and 64 columns together are a weighted sum of K rows
of 64: what embedding_bag computes of a table, with x for the weights of the sum. Its code (FBGEMM's) widens
16-bit rows as it goes and reads them in the order they lie in, where torch's dot products over the rows of W
are bound by their instructions (docs/perf-log.md has the figures). With AVX-512 those are as fast as the
memory already.

Layouts: x (1, K), W [N, K], table [N / 64 * K, 64], y (1, N). Sums are float32, y is rounded to W's dtype.
"""

import functools

import torch

_COLUMNS = 64


def table_of(weight: torch.Tensor) -> torch.Tensor | None:
    """The weight [N, K] as bag_product takes it, a new tensor; None where that gains nothing or N is odd."""
    fits = weight.dtype.itemsize == 2 and weight.shape[0] % _COLUMNS == 0
    if not fits or torch.backends.cpu.get_cpu_capability() != "AVX2":
        return None
    columns = weight.view(-1, _COLUMNS, weight.shape[1]).transpose(1, 2)
    return columns.clone(memory_format=torch.contiguous_format).view(-1, _COLUMNS)


def bag_product(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """(1, K) -> (1, N), of x's dtype; x is rounded to the table's."""
    assert x.shape[0] == 1, f"this is for one row, x has {x.shape[0]}"
    size = int(x.shape[1])
    rows, starts = _bags(table.shape[0], size)
    weights = x.to(table.dtype).expand(starts.shape[0], -1).flatten()
    y = torch.embedding_bag(table, rows, starts, False, 0, False, weights)[0]
    return y.view(1, -1).to(x.dtype)


@functools.cache
def _bags(num_rows: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of each bag, `size` of them, and where it begins. Shared by all weights of one shape."""
    return torch.arange(num_rows, dtype=torch.int32), torch.arange(0, num_rows, size, dtype=torch.int32)
