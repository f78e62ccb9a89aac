"""Which block sizes, warps and stages a kernel runs with: a tuned table per target, else the kernel's own
heuristic. Nothing is timed while serving, so the choice, and with it the result, is the same at every run.

A table is `tuned/<target>.json`: {kernel: {key: {bucket: entry}}}. key: what must match exactly, such as
"bfloat16,128"; bucket: a size, of which the smallest that is not below the asked one is taken, or the
largest. entry: {"blocks": {...}, "num_warps": 4, "num_stages": 2, "options": {...}}.
"""

import bisect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from halimede.errors import KernelError
from halimede.kernels.target import Target

TUNED = Path(__file__).parent / "tuned"

_COMMON_OPTIONS = frozenset({"num_ctas"})
_BACKEND_OPTIONS = {
    "cuda": frozenset({"maxnreg"}),
    "hip": frozenset({"waves_per_eu", "matrix_instr_nonkdim", "kpack"}),
}


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """blocks: the kernel's constexprs of block sizes. options: those of one backend; others ignore them."""

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2
    options: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    def triton_options(self, target: Target) -> dict[str, Any]:
        """What Triton's compiler is given. It refuses an option of another backend, so those are left out."""
        known = _COMMON_OPTIONS | _BACKEND_OPTIONS[target.backend]
        own = {name: value for name, value in self.options.items() if name in known}
        # Explicit, because Triton's default depends on its version and on the environment.
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
            **own,
        }


Table = Mapping[str, Mapping[str, tuple[tuple[int, KernelConfig], ...]]]
"""Kernel to key to (bucket, config), buckets ascending."""


def pick_config(
    kernel: str,
    target: Target,
    key: str,
    size: int,
    heuristic: Callable[[], KernelConfig],
    *,
    table: Table | None = None,
) -> KernelConfig:
    """The tuned config of a kernel for `key` at the bucket nearest to `size`, or what `heuristic` says."""
    entries = (tuned_table(target.name) if table is None else table).get(kernel, {}).get(key)
    if not entries:
        return heuristic()
    at = bisect.bisect_left(entries, size, key=lambda entry: entry[0])
    return entries[min(at, len(entries) - 1)][1]


@cache
def tuned_table(target: str) -> Table:
    """The table that ships for a target; empty if none does."""
    path = TUNED / f"{target}.json"
    return read_table(path) if path.exists() else MappingProxyType({})


def tuned_sizes(target: Target) -> tuple[int, ...]:
    """Sizes that together meet every bucket of every kernel in the target's table, ascending."""
    buckets = {size for keys in tuned_table(target.name).values() for size in _buckets(keys)}
    return tuple(sorted(buckets | {size + 1 for size in buckets}))


def tuned_bucket(kernel: str, target: Target, size: int) -> int:
    """A size for which pick_config chooses as it does for `size`, whatever its key: one of a few.

    For a size that varies from step to step, of which a variant for each would be too many.
    """
    tuned = tuned_table(target.name).get(kernel)
    if not tuned:
        return 0
    buckets = sorted(_buckets(tuned))
    return buckets[min(bisect.bisect_left(buckets, size), len(buckets) - 1)]


def _buckets(keys: Mapping[str, tuple[tuple[int, KernelConfig], ...]]) -> set[int]:
    """Of all keys of a kernel."""
    return {size for entries in keys.values() for size, _ in entries}


def read_table(path: Path) -> Table:
    """Read a table; KernelError that names the file and what is wrong with it."""
    try:
        kernels = json.loads(path.read_text())
        return {
            kernel: {
                key: tuple(
                    sorted(((int(b), _entry(e)) for b, e in buckets.items()), key=lambda pair: pair[0])
                )
                for key, buckets in keys.items()
            }
            for kernel, keys in kernels.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise KernelError(
            f"{path} is not a table of tuned kernels ({type(error).__name__}: {error}); "
            "delete it to run with the built-in choices"
        ) from error


def _entry(entry: Mapping[str, Any]) -> KernelConfig:
    unknown = entry.keys() - {"blocks", "num_warps", "num_stages", "options"}
    if unknown:
        raise ValueError(f"unknown fields {', '.join(sorted(unknown))}")
    return KernelConfig(
        blocks={name: int(value) for name, value in entry["blocks"].items()},
        num_warps=int(entry["num_warps"]),
        num_stages=int(entry["num_stages"]),
        options={name: int(value) for name, value in entry.get("options", {}).items()},
    )


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()
