"""Where the kernels of an engine come from: the kernel cache, else the compiler, if it may run."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from halimede.errors import CorruptKernelError, KernelCacheError
from halimede.kernels.build import build
from halimede.kernels.cache_dir import default_kernel_cache_dir
from halimede.kernels.specialise import TRITON_VERSION, Specialisation
from halimede.kernels.store import KernelEntry, KernelStore

logger = logging.getLogger(__name__)

JitPolicy = Literal["allow", "warn", "forbid"]

_REMEDY = "`halimede warmup MODEL --target TARGET`, with the settings of serving,"


@dataclass(slots=True)
class KernelCounters:
    """Since the library was made. jit_compile_seconds_total: how long compiling kept callers waiting."""

    jit_compiles_total: int = 0
    kernel_cache_hits_total: int = 0
    jit_compile_seconds_total: float = 0.0


class KernelLibrary:
    """Finds the binary of a specialisation: each once, from the cache or, by `jit`, from the compiler.

    jit: "forbid" raises KernelCacheError for a kernel that is not in the cache, "warn" says so in the log and
    compiles it, "allow" compiles it. What was compiled is kept in the cache where that can be written.
    remedy: the command that builds what is not there, for messages. devices: the DeviceKernels by the
    number of their device.
    """

    def __init__(self, store: KernelStore, jit: JitPolicy = "allow", *, remedy: str = _REMEDY) -> None:
        self.store = store
        self.counters = KernelCounters()
        self.devices: dict[int, Any] = {}
        self._jit = jit
        self.remedy = remedy
        self._can_write = True
        self._lock = threading.Lock()

    def find(self, specialisation: Specialisation) -> tuple[KernelEntry, bytes]:
        """Its manifest and binary. KernelError if it cannot be compiled, KernelCacheError if it may not."""
        found = self.find_cached(specialisation)
        if found is not None:
            return found
        if self._jit == "forbid":
            raise KernelCacheError(
                f"jit='forbid', and the kernel cache {self.store.folder} does not have "
                f"{describe(specialisation)}; {self.remedy} builds it"
            )
        return self._compile(specialisation)

    def find_cached(self, specialisation: Specialisation) -> tuple[KernelEntry, bytes] | None:
        """What `find` gives if the cache has it; compiles nothing. None also for one that is damaged, but
        with jit="forbid" a KernelCacheError."""
        found = self._read(specialisation)
        if found is not None:
            with self._lock:
                self.counters.kernel_cache_hits_total += 1
        return found

    def missing(self, specialisations: Iterable[Specialisation]) -> list[Specialisation]:
        """Those that the cache does not have; only names are looked at."""
        known: dict[str, frozenset[str]] = {}
        missing = []
        for wanted in specialisations:
            target = wanted.target.machine
            if target not in known:
                known[target] = self.store.keys(TRITON_VERSION, target)
            if wanted.key not in known[target]:
                missing.append(wanted)
        return missing

    def require(self, specialisations: Iterable[Specialisation]) -> None:
        """With jit="forbid", KernelCacheError that lists those that the cache lacks and how to make them."""
        if self._jit != "forbid":
            return
        missing = self.missing(specialisations)
        if missing:
            listed = "".join(f"\n  {describe(one)}" for one in missing)
            raise KernelCacheError(
                f"jit='forbid', and the kernel cache {self.store.folder} lacks {len(missing)} of the "
                f"kernels that may be needed; {self.remedy} builds them. They are:{listed}"
            )

    def _read(self, specialisation: Specialisation) -> tuple[KernelEntry, bytes] | None:
        try:
            return self.store.read(TRITON_VERSION, specialisation.target.machine, specialisation.key)
        except (CorruptKernelError, OSError) as error:
            if self._jit == "forbid":
                raise KernelCacheError(
                    f"jit='forbid', and the kernel cache does not give {describe(specialisation)}: {error}; "
                    f"{self.remedy} builds it again"
                ) from error
            logger.warning("%s; the kernel is compiled again", error)
            return None

    def _compile(self, specialisation: Specialisation) -> tuple[KernelEntry, bytes]:
        level = logging.WARNING if self._jit == "warn" else logging.INFO
        logger.log(level, "compiling %s: it is not in the kernel cache", describe(specialisation))
        start = time.monotonic()
        entry, binary = build(specialisation)
        seconds = time.monotonic() - start
        with self._lock:
            self.counters.jit_compiles_total += 1
            self.counters.jit_compile_seconds_total += seconds
        self._keep(entry, binary)
        return entry, binary

    def _keep(self, entry: KernelEntry, binary: bytes) -> None:
        if not self._can_write:
            return
        try:
            self.store.write(entry, binary)
        except OSError as error:
            self._can_write = False
            logger.warning(
                "the kernel cache %s cannot be written (%s): kernels that are compiled are kept in memory "
                "only, and compiled again at the next start; free disk space or choose another folder with "
                "kernel_cache_dir",
                self.store.folder,
                error,
            )


def describe(specialisation: Specialisation) -> str:
    """A line for people: kernel, target, what it is specialised for, key."""
    fixed = " ".join(
        f"{name}={value}" for name, value in specialisation.constants.items() if value is not None
    )
    types = " ".join(kind for kind in specialisation.signature.values() if kind != "constexpr")
    name = specialisation.name.partition(":")[2].removeprefix("_").removesuffix("_kernel")
    options = f"warps={specialisation.options['num_warps']} stages={specialisation.options['num_stages']}"
    machine, key = specialisation.target.machine, specialisation.key
    return f"{name} for {machine} [{types}] {fixed} {options} (key {key})"


_current: ContextVar[KernelLibrary | None] = ContextVar("halimede_kernel_library", default=None)


@contextlib.contextmanager
def using(library: KernelLibrary) -> Iterator[None]:
    """Launches inside take their kernels from `library`."""
    token = _current.set(library)
    try:
        yield
    finally:
        _current.reset(token)


def current_library() -> KernelLibrary:
    """The library of the enclosing `using`; outside of it one over the default folder that may compile."""
    return _current.get() or _default_library()


@cache
def _default_library() -> KernelLibrary:
    return KernelLibrary(KernelStore(default_kernel_cache_dir()))
