"""Files that appear whole or not at all, for folders that many processes share without a lock."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY_NAME = re.compile(r"tmp-[0-9a-f]{16}")
"""What a file is called until it is whole; a writer that is killed leaves it."""

_TRIES = 3


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends; after an error nothing changed.

    Raises OSError: the disk is full, the folder is missing or may not be written, `path` is a folder.
    """
    # Random, not the process id: processes of several machines may share the folder.
    temporary = path.parent / f"tmp-{secrets.token_hex(8)}"
    try:
        # No fsync: it would cost more than the writing, and a power cut that leaves a file torn is found by
        # the digests that every reader checks.
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file, and the folders above it that are missing. Raises OSError as atomic_file does."""
    for tries_left in reversed(range(_TRIES)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:
                file.write(data)
            return
        except FileNotFoundError:  # `prune` of another process removed the folder while it was empty
            if not tries_left:
                raise
