"""Compiled kernels as one file, to carry to another machine: pack, unpack, and how two of them differ.

An archive is a tar of v1/<Triton's version>/<target>/<file>, with the files as store.py has them. The same
kernels give the same bytes, compressed ones with the same version of the package zstandard.
"""

import hashlib
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from halimede.errors import CorruptKernelError, KernelCacheError
from halimede.kernels.archive_tar import read_archive, write_archive
from halimede.kernels.atomic_file import atomic_file, write_atomically
from halimede.kernels.store import KernelStore, StoredKernel
from halimede.kernels.store_entry import (
    FILE_NAME,
    FORMAT,
    TARGET_NAME,
    TRITON_NAME,
    KernelEntry,
    read_manifest,
)

_MEMBER = re.compile(
    "/".join(
        f"(?:{part})" for part in (f"v{FORMAT}", TRITON_NAME.pattern, TARGET_NAME.pattern, FILE_NAME.pattern)
    )
)
_FORMAT = re.compile(r"v([0-9]+)/.*")
_SUFFIXES = (".tar.zst", ".tar")
_SHOWN = 10

KernelId = tuple[str, str, str]
"""Triton's version, target, key."""


@dataclass(frozen=True, slots=True)
class Packed:
    """entries: kernels in the archive. bytes, sha256: of the archive's file."""

    entries: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Unpacked:
    """Kernels of the archive: new, or of another content than before; and those that were there already."""

    new: int
    same: int


@dataclass(frozen=True, slots=True)
class Difference:
    """Kernels that only one of two has, and those of the same key whose binaries differ; sorted."""

    only_a: tuple[KernelEntry, ...]
    only_b: tuple[KernelEntry, ...]
    changed: tuple[tuple[KernelEntry, KernelEntry], ...]

    def __bool__(self) -> bool:
        return bool(self.only_a or self.only_b or self.changed)


def pack(
    store: KernelStore, out: Path, *, targets: Collection[str] | None = None, triton: str | None = None
) -> Packed:
    """Write the kernels, or those for `targets` and a version of Triton, to `out`, whole or not at all.

    Raises KernelCacheError: `out` is named neither .tar.zst nor .tar, nothing is to be packed, kernels are
    corrupt (all are named), zstandard is missing; OSError: something cannot be read or written.
    """
    if not out.name.endswith(_SUFFIXES):
        raise KernelCacheError(f"{str(out)!r} is not named as an archive; end it in .tar.zst or .tar")
    wanted = [
        place
        for place in store.folders()
        if (targets is None or place[1] in targets) and triton in (None, place[0])
    ]
    keys = {place: sorted(store.keys(*place)) for place in wanted}
    _refuse_corrupt(store, keys)
    count = sum(map(len, keys.values()))
    if not count:
        there = ", ".join(f"{target} (Triton {version})" for version, target in store.folders())
        raise KernelCacheError(f"{store.folder} has no such kernels to pack; it has: {there or 'none'}")
    with atomic_file(out) as file:
        sink = _HashingSink(file)
        write_archive(sink, _members(store, keys), compress=out.name.endswith(".zst"))
    return Packed(count, sink.size, sink.sha256.hexdigest())


def unpack(archive: Path, store: KernelStore, *, sha256: str | None = None) -> Unpacked:
    """Put the kernels of an archive into the store; the whole archive is checked before anything is written.

    sha256: what the archive's file must have. Raises KernelCacheError: it has not, or the archive is missing,
    truncated, damaged, of another format, or holds anything but whole kernels; OSError: something cannot be
    read or written.
    """
    with _opened(archive) as file:
        if sha256 is not None:
            _check_sha256(file, archive, sha256)
        contents = _check(file, archive)
        new = {kernel for kernel in contents.entries if not _is_stored(store, contents, kernel)}
        names = {name for kernel in new for name in contents.names(kernel)}
        # All binaries before the first manifest: who finds a manifest finds its binary.
        for manifests in (False, True):
            for name, data in read_archive(file, str(archive)):
                if name in names and name.endswith(".json") == manifests:
                    if contents.digests[name] != hashlib.sha256(data).hexdigest():
                        raise KernelCacheError(f"{archive} was changed while it was read; unpack it again")
                    write_atomically(store.folder / name, data)
    return Unpacked(len(new), len(contents.entries) - len(new))


def diff(a: Path, b: Path) -> Difference:
    """Compare two kernel caches or archives by their kernels' keys and binaries.

    Raises KernelCacheError: one is missing, corrupt or no archive; OSError: something cannot be read.
    """
    left, right = _load(a), _load(b)
    return Difference(
        tuple(left[k] for k in sorted(left.keys() - right.keys())),
        tuple(right[k] for k in sorted(right.keys() - left.keys())),
        tuple(
            (left[k], right[k])
            for k in sorted(left.keys() & right.keys())
            if left[k].sha256 != right[k].sha256
        ),
    )


@dataclass(frozen=True, slots=True)
class _Contents:
    """Of an archive that holds whole kernels only. digests: SHA-256 of each member, by its name."""

    entries: dict[KernelId, KernelEntry]
    digests: dict[str, str]

    def names(self, kernel: KernelId) -> tuple[str, str]:
        """The members that are a kernel's manifest and binary."""
        entry = self.entries[kernel]
        folder = f"v{FORMAT}/{entry.triton}/{entry.target}"
        return f"{folder}/{entry.manifest_name}", f"{folder}/{entry.binary_name}"


def _check(file: BinaryIO, archive: Path) -> _Contents:
    """Read the archive to its end; KernelCacheError if it holds anything but whole kernels."""
    contents, sizes = _Contents({}, {}), {}
    for name, data in read_archive(file, str(archive)):
        _check_name(name, archive)
        if name in contents.digests:
            raise KernelCacheError(f"{archive} holds {name} twice; pack it again")
        contents.digests[name] = hashlib.sha256(data).hexdigest()
        sizes[name] = len(data)
        if name.endswith(".json"):
            try:
                entry = read_manifest(data)
            except ValueError as error:
                raise KernelCacheError(f"{archive}: {name} {error}; pack it again") from error
            kernel = (entry.triton, entry.target, entry.key)
            contents.entries[kernel] = entry
            if contents.names(kernel)[0] != name:
                raise KernelCacheError(f"{archive}: {name} is of {'/'.join(kernel)}; pack it again")
    rest = set(sizes)
    for kernel, entry in contents.entries.items():
        manifest, binary = contents.names(kernel)
        if sizes.get(binary) != entry.size or contents.digests[binary] != entry.sha256:
            fact = "does not fit its digest" if binary in sizes else "is missing"
            raise KernelCacheError(f"{archive}: {binary}, which {manifest} needs, {fact}; pack it again")
        rest -= {manifest, binary}
    if rest:
        raise KernelCacheError(f"{archive}: {min(rest)} belongs to no kernel; pack it again")
    return contents


def _check_name(name: str, archive: Path) -> None:
    """Refuse every name but those that `pack` gives; nothing else may become a path."""
    if _MEMBER.fullmatch(name):
        return
    other = _FORMAT.fullmatch(name)
    if name.startswith(("/", "\\")):
        fact = "is an absolute path; nothing was unpacked"
    elif ".." in re.split(r"[/\\]", name):
        fact = "leaves the folder; nothing was unpacked"
    elif other and int(other[1]) != FORMAT:
        fact = f"is of format {other[1]}; this Halimede reads {FORMAT}: pack with the version that unpacks"
    else:
        fact = "is no name of a kernel's file; give an archive that `halimede kernels pack` made"
    raise KernelCacheError(f"{archive}: {name!r} {fact}")


def _check_sha256(file: BufferedReader, archive: Path, wanted: str) -> None:
    if not re.fullmatch(r"[0-9a-f]{64}", wanted.lower()):
        raise KernelCacheError(f"{wanted!r} is not a SHA-256; it is 64 hex digits, as `pack` prints them")
    found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted.lower():
        raise KernelCacheError(
            f"{archive} has the SHA-256 {found}, not {wanted.lower()}; copy it again, or ask where it is from"
        )


def _is_stored(store: KernelStore, contents: _Contents, kernel: KernelId) -> bool:
    try:
        found = store.read_files(*kernel)
    except CorruptKernelError:  # the archive's takes its place
        return False
    if found is None:
        return False
    manifest = hashlib.sha256(found.manifest).hexdigest()
    return manifest == contents.digests[contents.names(kernel)[0]]


def _refuse_corrupt(store: KernelStore, keys: dict[tuple[str, str], list[str]]) -> None:
    found = []
    for place, names in keys.items():
        for key in names:
            try:
                store.read_files(*place, key)
            except CorruptKernelError as error:
                found.append(f"{error.path} {error.fact}")
    if found:
        more = f"\n  and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise KernelCacheError(
            f"{store.folder} has {len(found)} corrupt kernels; remove them with `halimede kernels prune` "
            "or build them again with `halimede warmup`:\n  " + "\n  ".join(found[:_SHOWN]) + more
        )


def _members(store: KernelStore, keys: dict[tuple[str, str], list[str]]) -> Iterator[tuple[str, bytes]]:
    """Names and contents for an archive, sorted by folder and key; a binary that is shared comes once."""
    for place, names in keys.items():
        written = set()
        for key in names:
            found: StoredKernel | None = store.read_files(*place, key)
            if found is None:
                raise KernelCacheError(f"kernel {key} was removed from {store.folder}; pack again")
            folder = f"v{FORMAT}/{'/'.join(place)}"
            if found.entry.binary_name not in written:
                written.add(found.entry.binary_name)
                yield f"{folder}/{found.entry.binary_name}", found.binary
            yield f"{folder}/{found.entry.manifest_name}", found.manifest


def _load(path: Path) -> dict[KernelId, KernelEntry]:
    if not path.is_dir():
        with _opened(path) as file:
            return _check(file, path).entries
    store = KernelStore(path)
    _refuse_corrupt(store, {place: sorted(store.keys(*place)) for place in store.folders()})
    return {(entry.triton, entry.target, entry.key): entry for entry in store.entries()}


@contextmanager
def _opened(archive: Path) -> Iterator[BufferedReader]:
    try:
        file = archive.open("rb")
    except FileNotFoundError:
        raise KernelCacheError(f"{archive} does not exist; name an archive or a kernel cache") from None
    with file:
        yield file


class _HashingSink:
    """Writes to a file and keeps count."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes, /) -> int:
        self._file.write(data)
        self.size += len(data)
        self.sha256.update(data)
        return len(data)
