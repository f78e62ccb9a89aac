"""How far a product is from what it should be: the float64 product of what its weight stands for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_MOST_ROWS = 96  # that are compared, out of all of them


@dataclass(frozen=True)
class Bounds:
    """rms: of all errors, as a share of the result. largest: of one, as a share of its row's RMS."""

    rms: float
    largest: float


# bfloat16 rounds a result by 0.17 % of it in the mean, and a 16-bit weight made of codes as much; numbers of
# five times the RMS by up to 1 % of that. Sums of many products that stay in Hopper's FP8 units: 0.33 %
# in the mean at K = 14,336, one of millions by 5 %.
EXACT = Bounds(0.006, 0.06)
# Of activations that the form rounds itself: e4m3 by 2.6 %, int8 by 0.9 % at 4 sigma in 127 steps.
ROUNDED = {torch.int8: Bounds(0.02, 0.12), torch.float8_e4m3fn: Bounds(0.045, 0.25)}


@dataclass(frozen=True)
class Errors:
    rms: float
    largest: float

    def within(self, bounds: Bounds) -> bool:
        """False too where one is NaN."""
        return self.rms <= bounds.rms and self.largest <= bounds.largest


def errors_of(actual: torch.Tensor, expected: torch.Tensor) -> Errors:
    """actual, expected: (M, N), the latter float64."""
    distance = actual.double() - expected
    rows = expected.square().mean(1, keepdim=True).sqrt().clamp_(min=1e-30)
    rms = distance.square().mean().sqrt() / expected.square().mean().sqrt().clamp_(min=1e-30)
    return Errors(float(rms), float((distance.abs() / rows).amax()))


def compared_rows(num_rows: int, device: torch.device) -> torch.Tensor:
    """Some rows, the first and the last among them."""
    if num_rows <= _MOST_ROWS:
        return torch.arange(num_rows, device=device)
    return torch.linspace(0, num_rows - 1, _MOST_ROWS, device=device, dtype=torch.float64).round().long()


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, or the largest integer."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def check_product(
    call: Callable[[], torch.Tensor], values: torch.Tensor, weight: torch.Tensor, bounds: Bounds
) -> Errors:
    """Errors of what `call` gives for values (M, K) float64 times weight [N, K] float64, twice in a row.

    AssertionError beyond the bounds, or where the second run has other bits.
    """
    rows = compared_rows(values.shape[0], values.device)
    with poisoned_memory():
        first, second = call(), call()
    assert first.shape == (values.shape[0], weight.shape[0]), f"the result is {tuple(first.shape)}"
    found = errors_of(first[rows], values[rows] @ weight.t())
    assert found.within(bounds), f"{found} are beyond {bounds}"
    assert torch.equal(first, second), "the same call again gives other bits"
    return found
