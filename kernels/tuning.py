"""Which block sizes, warps and stages a kernel runs with: a tuned table per target, else the kernel's own
heuristic. Nothing is timed while serving, so the choice, and with it the result, is the same at every run.

A table is `tuned/<target>.json`: {kernel: {key: {bucket: entry}}}. key: what must match exactly, such as
"bfloat16,128"; bucket: a size, of which the smallest that is not below the asked one is taken, or the
largest. entry: {"blocks": {...}, "num_warps": 4, "num_stages": 2, "options": {...}}.

A table ships with the package, another may lie in the user's kernel cache (`tables_in`, made by `halimede
tune`); what that has goes before what ships, bucket by bucket.
"""

import bisect
import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from halimede.errors import KernelError
from halimede.kernels.target import Target

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True, slots=True)
class Pick:
    """What pick_config was asked for."""

    kernel: str
    key: str
    size: int
    heuristic: Callable[[], KernelConfig]


Choose = Callable[[Pick], KernelConfig | None]


@dataclass(frozen=True, slots=True)
class _Choices:
    """What is chosen otherwise than the tables that ship say. target: whose configs `choose` picks."""

    folder: Path | None = None
    target: Target | None = None
    choose: Choose = lambda pick: None

    def table(self, target: str) -> Table:
        """What ships, with the user's table over it where there is one."""
        return tuned_table(target) if self.folder is None else _merged_table(self.folder, target)


_choices: ContextVar[_Choices] = ContextVar("halimede_config_choices", default=_Choices())  # noqa: B039


@contextlib.contextmanager
def overriding(target: Target, choose: Choose) -> Iterator[Target]:
    """Inside, `choose` picks the configs of launches for the target that this gives; None: as ever.

    The target is like `target`, but one of its own. Launchers keep their variants by the target's identity:
    so none that they have hides what is chosen here, and what is chosen here is met by nobody else.
    """
    own = replace(target)
    token = _choices.set(replace(_choices.get(), target=own, choose=choose))
    try:
        yield own
    finally:
        _choices.reset(token)


@contextlib.contextmanager
def tables_in(folder: Path) -> Iterator[None]:
    """Inside, the table of a target that is in a kernel cache goes before what ships.

    Launchers keep what they have chosen: a process has one such folder, all the time that it launches.
    """
    token = _choices.set(replace(_choices.get(), folder=folder))
    try:
        yield
    finally:
        _choices.reset(token)


def user_table_path(folder: Path, target: str) -> Path:
    """The table of a target in a kernel cache."""
    return folder / "tuned" / f"{target}.json"


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
    choices = _choices.get()
    if choices.target is target:
        chosen = choices.choose(Pick(kernel, key, size, heuristic))
        if chosen is not None:
            return chosen
    entries = (choices.table(target.name) if table is None else table).get(kernel, {}).get(key)
    if not entries:
        return heuristic()
    at = bisect.bisect_left(entries, size, key=lambda entry: entry[0])
    found = entries[min(at, len(entries) - 1)][1]
    return found if choices.folder is None else _if_of_this_version(kernel, found, heuristic())


def _if_of_this_version(kernel: str, tuned: KernelConfig, own: KernelConfig) -> KernelConfig:
    """A user's table may be older than the kernel, whose blocks may since have got other names."""
    if tuned.blocks.keys() == own.blocks.keys():
        return tuned
    logger.warning(
        "the tuned table of the kernel cache has blocks %s for %s, which has %s now: it runs with the "
        "built-in choice; run `halimede tune` again",
        ", ".join(sorted(tuned.blocks)),
        kernel,
        ", ".join(sorted(own.blocks)),
    )
    return own


@cache
def _merged_table(folder: Path, target: str) -> Table:
    shipped, path = tuned_table(target), user_table_path(folder, target)
    if not path.exists():
        return shipped
    own = read_table(path)
    return {
        kernel: {
            key: tuple(
                sorted(
                    {
                        **dict(shipped.get(kernel, {}).get(key, ())),
                        **dict(own.get(kernel, {}).get(key, ())),
                    }.items(),
                    key=lambda pair: pair[0],
                )
            )
            for key in shipped.get(kernel, {}).keys() | own.get(kernel, {}).keys()
        }
        for kernel in shipped.keys() | own.keys()
    }


@cache
def tuned_table(target: str) -> Table:
    """The table that ships for a target; empty if none does."""
    path = TUNED / f"{target}.json"
    return read_table(path) if path.exists() else MappingProxyType({})


def tuned_sizes(target: Target) -> tuple[int, ...]:
    """Sizes that together meet every bucket of every kernel in the target's table, ascending."""
    buckets = {size for keys in _choices.get().table(target.name).values() for size in _buckets(keys)}
    return tuple(sorted(buckets | {size + 1 for size in buckets}))


def tuned_bucket(kernel: str, target: Target, size: int) -> int:
    """A size for which pick_config chooses as it does for `size`, whatever its key: one of a few.

    For a size that varies from step to step, of which a variant for each would be too many.
    """
    choices = _choices.get()
    if choices.target is target:
        return size
    tuned = choices.table(target.name).get(kernel)
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


def entry_json(config: KernelConfig) -> dict[str, Any]:
    """A config as a table has it."""
    options = {"options": dict(config.options)} if config.options else {}
    return {
        "blocks": dict(config.blocks),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **options,
    }


def table_json(table: Table) -> str:
    """The text of a table: sorted, a line for each entry, so that two can be compared."""
    kernels = []
    for kernel in sorted(table):
        keys = []
        for key in sorted(table[kernel]):
            lines = [
                f"   {json.dumps(str(bucket))}: {json.dumps(entry_json(config), sort_keys=True)}"
                for bucket, config in table[kernel][key]
            ]
            keys.append(f"  {json.dumps(key)}: {{\n" + ",\n".join(lines) + "\n  }")
        kernels.append(f" {json.dumps(kernel)}: {{\n" + ",\n".join(keys) + "\n }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()
