"""Removes from a folder of compiled kernels what no one can use any more.

Files whose names are not the cache's own are never touched. Others may write meanwhile: a binary that has no
manifest yet and a temporary file go only when they are an hour old.
"""

import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from halimede.errors import CorruptKernelError
from halimede.kernels.atomic_file import TEMPORARY_NAME
from halimede.kernels.store import KernelStore
from halimede.kernels.store_entry import FILE_NAME, FORMAT, TARGET_NAME, TRITON_NAME, KernelEntry

_GRACE_SECONDS = 3600.0
_FORMAT_NAME = re.compile(r"v(0|[1-9][0-9]{0,8})")


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was removed, or would be: files, and the bytes they held."""

    removed: tuple[Path, ...]
    bytes: int


def prune(store: KernelStore, is_current: Callable[[KernelEntry], bool], *, dry_run: bool = False) -> Pruned:
    """Remove corrupt kernels, those for which `is_current` is false, those of other formats, and leftovers.

    dry_run: only say what would go. Raises OSError: something cannot be read, and nothing was removed, or
    cannot be removed.
    """
    useless = [*_other_formats(store.folder), *_useless_manifests(store, is_current)]
    leftovers = list(_leftovers(store, set(useless)))
    now = _file_system_time(store.folder) if leftovers else 0.0
    removed, size = [], 0
    for path, young_stays in [*((p, False) for p in useless), *((p, True) for p in leftovers)]:
        with suppress(FileNotFoundError):  # another process prunes, too
            status = path.lstat()  # only now: a writer may have made the file new since the listing
            # A file from the future is one of a machine whose clock is wrong, and may be old.
            young = abs(now - status.st_mtime) <= _GRACE_SECONDS
            if stat.S_ISDIR(status.st_mode) or (young and young_stays):
                continue
            if not dry_run:
                path.unlink()
            removed.append(path)
            size += status.st_size
    if not dry_run:
        for path in removed:
            _remove_empty_folders(path.parent, store.folder)
    return Pruned(tuple(removed), size)


def _other_formats(folder: Path) -> Iterator[Path]:
    """Manifests, binaries and temporary files in v<number> folders of other numbers, and nothing else."""
    for format_folder in _subfolders(folder, _FORMAT_NAME):
        if format_folder.name != f"v{FORMAT}":
            for triton_folder in _subfolders(format_folder, TRITON_NAME):
                for target_folder in _subfolders(triton_folder, TARGET_NAME):
                    for path in sorted(target_folder.iterdir()):
                        if FILE_NAME.fullmatch(path.name) or TEMPORARY_NAME.fullmatch(path.name):
                            yield path


def _useless_manifests(store: KernelStore, is_current: Callable[[KernelEntry], bool]) -> Iterator[Path]:
    for triton, target in store.folders():
        for key in sorted(store.keys(triton, target)):
            try:
                found = store.read_files(triton, target, key)
            except CorruptKernelError:  # it can never be loaded, and whose it was cannot be told
                keep = False
            else:
                keep = found is None or is_current(found.entry)
            if not keep:
                yield store.root / triton / target / f"{key}.json"


def _leftovers(store: KernelStore, useless: set[Path]) -> Iterator[Path]:
    """Temporary files, and binaries that only useless manifests need."""
    with suppress(FileNotFoundError):
        yield from sorted(path for path in store.folder.iterdir() if TEMPORARY_NAME.fullmatch(path.name))
    # The files first: a kernel that is written after that is not among them.
    files = [
        store.root / triton / target / name
        for triton, target in store.folders()
        for name in store.files(triton, target)
        if not name.endswith(".json")
    ]
    manifests = [(store.root / entry.triton / entry.target, entry) for entry in store.entries()]
    needed = {
        folder / entry.binary_name
        for folder, entry in manifests
        if folder / entry.manifest_name not in useless
    }
    yield from (path for path in files if path not in needed)


def _file_system_time(folder: Path) -> float:
    """Now, by the clock that gives files their times; that of a shared folder may not be this machine's."""
    probe = folder / f"tmp-{secrets.token_hex(8)}"
    try:
        with open(probe, "xb") as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:  # the folder may not be written, and the removals will say so
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink()


def _remove_empty_folders(folder: Path, top: Path) -> None:
    """The folder and those above it, up to `top`, as long as they are empty."""
    with suppress(OSError):
        while folder != top:
            folder.rmdir()
            folder = folder.parent


def _subfolders(folder: Path, name: re.Pattern[str]) -> list[Path]:
    """Not links: what they lead to is not in the cache's folder."""
    try:
        with os.scandir(folder) as listing:
            found = [e.name for e in listing if name.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    return [folder / n for n in sorted(found)]
