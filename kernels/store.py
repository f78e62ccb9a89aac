"""Compiled kernels on disk, in a folder that may be moved, copied and shared.

    FOLDER/v1/<Triton's version>/<target>/<key>.json                     the manifest (store_entry.py)
    FOLDER/v1/<Triton's version>/<target>/<sha256[:32]>.cubin | .hsaco   the binary

Nothing in it depends on the folder, the machine, the user, the time or Python's version. Many processes may
read and write it at once, with no lock: every file appears whole (atomic_file.py), the binary before its
manifest, and a file of the same name holds the same. What a reader finds was checked against its digests.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from halimede.errors import CorruptKernelError, KernelCacheError
from halimede.kernels.atomic_file import TEMPORARY_NAME, write_atomically
from halimede.kernels.store_entry import (
    FILE_NAME,
    FORMAT,
    KEY_NAME,
    TARGET_NAME,
    TRITON_NAME,
    KernelEntry,
    read_manifest,
    write_manifest,
)

__all__ = ["KernelEntry", "KernelStore", "Problem", "StoredKernel"]


@dataclass(frozen=True, slots=True)
class Problem:
    """What `verify` found. leftover: nothing is broken, but no kernel needs the file; `prune` removes it."""

    path: Path
    fact: str
    leftover: bool = False


@dataclass(frozen=True, slots=True)
class StoredKernel:
    """One kernel as it lies on disk; both files fit their digests."""

    entry: KernelEntry
    manifest: bytes
    binary: bytes


class KernelStore:
    """The kernels in one folder, which need not exist before the first is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / f"v{FORMAT}"

    def read(self, triton: str, target: str, key: str) -> tuple[KernelEntry, bytes] | None:
        """A kernel's manifest and binary; None: there is no such kernel.

        Raises CorruptKernelError: manifest or binary is altered, truncated or missing, or is of another
        key; KernelCacheError: no version, target or key has that name; OSError: a file cannot be read.
        """
        found = self.read_files(triton, target, key)
        return None if found is None else (found.entry, found.binary)

    def read_files(self, triton: str, target: str, key: str) -> StoredKernel | None:
        """As `read`, with the manifest's bytes."""
        if not KEY_NAME.fullmatch(key):
            raise KernelCacheError(f"{key!r} is not the key of a kernel; a key is 32 hex digits")
        folder = self._folder(triton, target)
        path = folder / f"{key}.json"
        try:
            manifest = path.read_bytes()
        except FileNotFoundError:
            return None
        entry = _checked_entry(path, manifest, triton, target)
        binary_path = folder / entry.binary_name
        try:
            binary = binary_path.read_bytes()
        except FileNotFoundError:
            raise CorruptKernelError(str(binary_path), f"is missing, but {path.name} needs it") from None
        if len(binary) != entry.size:
            fact = f"has {len(binary)} bytes, but by {path.name} it has {entry.size}"
            raise CorruptKernelError(str(binary_path), fact)
        if hashlib.sha256(binary).hexdigest() != entry.sha256:
            fact = f"was altered: it does not fit the digest in {path.name}"
            raise CorruptKernelError(str(binary_path), fact)
        return StoredKernel(entry, manifest, binary)

    def keys(self, triton: str, target: str) -> frozenset[str]:
        """The keys of all kernels for one version and target, from one listing; nothing is read.

        Raises KernelCacheError: no version or target has that name; OSError: the folder cannot be read.
        """
        return frozenset(n.removesuffix(".json") for n in self.files(triton, target) if n.endswith(".json"))

    def files(self, triton: str, target: str) -> list[str]:
        """Names of files that are the cache's own, temporary ones too, sorted. Raises as `keys` does."""
        try:
            names = os.listdir(self._folder(triton, target))
        except FileNotFoundError:
            return []
        return sorted(n for n in names if FILE_NAME.fullmatch(n) or TEMPORARY_NAME.fullmatch(n))

    def write(self, entry: KernelEntry, binary: bytes) -> None:
        """Add a kernel, or put it in the place of what is there; it repairs a corrupt one.

        Raises KernelCacheError: the manifest does not fit the binary, or holds what it may not; OSError: the
        disk is full, or the folder may not be written; what was there before is whole.
        """
        try:
            manifest = write_manifest(entry)
        except ValueError as error:
            raise KernelCacheError(f"the manifest of {entry.kernel} cannot be written: it {error}") from error
        if entry.size != len(binary) or entry.sha256 != hashlib.sha256(binary).hexdigest():
            raise KernelCacheError(
                f"the binary of {entry.kernel} ({len(binary)} bytes) is not that of its manifest "
                f"({entry.size} bytes, SHA-256 {entry.sha256}); make the manifest from the binary"
            )
        folder = self._folder(entry.triton, entry.target)
        # The binary first: who finds a manifest finds its binary. And always, even if it is there: the new
        # time tells `prune` that it is about to be needed.
        write_atomically(folder / entry.binary_name, binary)
        write_atomically(folder / entry.manifest_name, manifest)

    def remove(self, triton: str, target: str, key: str) -> bool:
        """Remove a kernel; False: it was not there. The binary, which others may share, is left to `prune`.

        Raises KernelCacheError as `read` does, and OSError.
        """
        if not KEY_NAME.fullmatch(key):
            raise KernelCacheError(f"{key!r} is not the key of a kernel; a key is 32 hex digits")
        try:
            (self._folder(triton, target) / f"{key}.json").unlink()
        except FileNotFoundError:
            return False
        return True

    def folders(self) -> Iterator[tuple[str, str]]:
        """Every version and target that has a folder, sorted. Raises OSError."""
        for triton in _subfolders(self.root):
            if TRITON_NAME.fullmatch(triton):
                for target in _subfolders(self.root / triton):
                    if TARGET_NAME.fullmatch(target):
                        yield triton, target

    def entries(self) -> Iterator[KernelEntry]:
        """Every manifest, sorted by version, target, kernel and key. Binaries are not read.

        Corrupt manifests are left out; `verify` finds them. Raises OSError: a file cannot be read.
        """
        for triton, target in self.folders():
            found = []
            for key in self.keys(triton, target):
                path = self._folder(triton, target) / f"{key}.json"
                try:
                    found.append(_checked_entry(path, path.read_bytes(), triton, target))
                except (CorruptKernelError, FileNotFoundError):  # not found: removed since the listing
                    continue
            yield from sorted(found, key=lambda entry: (entry.kernel, entry.key))

    def verify(self) -> list[Problem]:
        """Read and check every manifest and every binary. Raises OSError: a folder cannot be read."""
        problems: list[Problem] = []
        for triton, target in self.folders():
            folder, names = self._folder(triton, target), self.files(triton, target)
            needed = set()
            for name in (n for n in names if n.endswith(".json")):
                try:
                    found = self.read_files(triton, target, name.removesuffix(".json"))
                except CorruptKernelError as error:
                    problems.append(Problem(Path(error.path), error.fact))
                except OSError as error:
                    problems.append(Problem(folder / name, f"cannot be read ({error})"))
                else:
                    needed |= {found.entry.binary_name} if found else set()
            broken = {problem.path for problem in problems}
            problems += [
                Problem(folder / name, _leftover_fact(name), leftover=True)
                for name in names
                if not name.endswith(".json") and name not in needed and folder / name not in broken
            ]
        return problems

    def _folder(self, triton: str, target: str) -> Path:
        for name, pattern, kind in (
            (triton, TRITON_NAME, "a version of Triton, such as 3.6.0"),
            (target, TARGET_NAME, "a target, such as sm_90 or gfx942"),
        ):
            if not pattern.fullmatch(name):
                raise KernelCacheError(f"{name!r} is not {kind}")
        return self.root / triton / target


def _checked_entry(path: Path, manifest: bytes, triton: str, target: str) -> KernelEntry:
    """The manifest read from `path`; CorruptKernelError if it is not that of the kernel that `path` names."""
    try:
        entry = read_manifest(manifest)
    except ValueError as error:
        raise CorruptKernelError(str(path), str(error)) from error
    found, named = (entry.triton, entry.target, entry.key), (triton, target, path.stem)
    if found != named:
        raise CorruptKernelError(str(path), f"is the manifest of another kernel, {'/'.join(found)}")
    return entry


def _subfolders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as listing:
            return sorted(entry.name for entry in listing if entry.is_dir())
    except FileNotFoundError:
        return []


def _leftover_fact(name: str) -> str:
    if TEMPORARY_NAME.fullmatch(name):
        return "is a file that is being written, or whose writer was killed"
    return "is a binary that no whole manifest needs"
