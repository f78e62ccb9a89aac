"""Times calls and writes them down beside what the card can do."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from stage import Results
from timing import time_ms

# What a call reads again would come from the L2 cache, which serving's weights and KV cache do not fit.
_BEYOND_L2 = 256 << 20
_MOST_COPIES = 24


class Bench:
    """rehearsed: on a CPU, so with tiny shapes."""

    def __init__(self, device: torch.device, results: Results, best: Mapping[str, Any]) -> None:
        self.device, self.results, self.best = device, results, best
        self.rehearsed = results.rehearsal

    def add(
        self, group: str, name: str, call: Callable[[], Any], *, bytes: int, flops: int = 0, repeats: int = 1
    ) -> None:
        """Time a call, of which one of its `repeats` moves so many bytes and does so many FLOPs at least.

        What fails is reported and leaves the others alone.
        """
        with self.results.attempt(f"{group}: {name}"):
            ms = time_ms(call, self.device, repeats=repeats)
            row = {"group": group, "name": name, "ms": ms, "bytes": bytes, "flops": flops}
            row |= shares(ms, bytes, flops, self.best)
            self.results.add("rows", row)
            print(line_of(row), flush=True)

    def copies(self, num_bytes: int) -> int:
        """How many sets of tensors of that size, used in turn, are more than the L2 cache holds."""
        if self.rehearsed:
            return 1
        return max(1, min(_MOST_COPIES, -(-_BEYOND_L2 // max(1, num_bytes))))


def in_turn(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    """All of them, one after the other."""

    def run() -> None:
        for call in calls:
            call()

    return run


def shares(ms: float, num_bytes: int, flops: int, best: Mapping[str, Any]) -> dict[str, Any]:
    """Of the card's copy and matrix product. of_roofline: the larger of the two, which bounds the call."""
    of_copy = num_bytes / (ms / 1e3) / best["copy_bytes_per_s"]
    of_product = flops / (ms / 1e3) / best["bfloat16_flop_per_s"]
    return {"of_copy": of_copy, "of_product": of_product, "of_roofline": max(of_copy, of_product)}


def line_of(row: Mapping[str, Any]) -> str:
    seconds = row["ms"] / 1e3
    return (
        f"{row['group']:<26}{row['name']:<52}{row['ms'] * 1e3:>10.1f} us "
        f"{row['bytes'] / seconds / 1e9:>8.0f} GB/s ({row['of_copy']:>4.0%})"
        f" {row['flops'] / seconds / 1e12:>7.1f} TFLOP/s ({row['of_product']:>4.0%})"
    )
