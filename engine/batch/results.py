"""The results file: one line per finished request, in the order in which they finish.

It is the batch's whole state. A line is appended with one write, so that a process that is killed leaves at
most its last line torn; the next run cuts that off and goes on with the requests that have no line.
"""

import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from halimede.errors import BatchError

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

_FIRST_BYTES = b'{"id": "batch_req_'
DUPLICATE = "duplicate_custom_id"


@dataclass(slots=True)
class FinishedLines:
    """What a results file holds: the custom_ids, and the numbers of lines that have none of their own."""

    path: str
    custom_ids: set[str] = field(default_factory=set)
    line_numbers: set[int] = field(default_factory=set)
    num_failed: int = 0

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in one result. KeyError or TypeError if it is none."""
        error, response = record["error"], record["response"]
        is_duplicate = error is not None and error.get("code") == DUPLICATE
        if record["custom_id"] is None or is_duplicate:
            self.line_numbers.add(error["line"])
        else:
            self.custom_ids.add(record["custom_id"])
        self.num_failed += error is not None or response["status_code"] != 200


class ResultsFile:
    """A results file, held by this process alone. Nothing in it is changed before start() is called.

    What is no file ("-" for standard output, a pipe) is only written to. BatchError if it cannot be.
    """

    def __init__(self, path: str, *, overwrite: bool = False) -> None:
        self._path, self._overwrite = path, overwrite
        self._name = "standard output" if path == "-" else path
        self._end = 0
        self._ends_in_a_line = True
        try:
            self._file: IO[bytes] = _open(path)
        except OSError as error:
            raise self._failure(error) from error
        self._is_kept = path != "-" and Path(path).is_file()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self) -> FinishedLines:
        """What it holds; nothing if it is to be overwritten. BatchError if it holds anything but results."""
        finished = FinishedLines(self._name)
        if self._is_kept and not self._overwrite:
            try:
                with Path(self._path).open("rb") as file:
                    self._scan(file, finished)
            except OSError as error:
                raise self._failure(error) from error
        return finished

    def start(self) -> None:
        """Cut off what read() did not take: a torn last line, or everything."""
        if not self._is_kept:
            return
        try:
            self._file.truncate(self._end)
        except OSError as error:
            raise self._failure(error) from error
        if not self._ends_in_a_line:
            self._write(b"\n")

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one result as a line. BatchError if it cannot be written."""
        try:
            line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can say and UTF-8 cannot
            line = json.dumps(record, allow_nan=False).encode()
        self._write(line + b"\n")

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:  # a full disk takes a part of it, and says so the next time
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise self._failure(error) from error

    def _scan(self, file: IO[bytes], finished: FinishedLines) -> None:
        for number, line in enumerate(file, 1):
            is_whole = line.endswith(b"\n")
            try:
                if line.strip():
                    finished.add(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                is_torn = self._end > 0 or _FIRST_BYTES.startswith(line[: len(_FIRST_BYTES)])
                if is_whole or not is_torn:
                    raise BatchError(
                        f"line {number} of {self._name} is not the result of a batch; name another file for "
                        "the results, or overwrite this one"
                    ) from error
                return
            self._end += len(line)
            self._ends_in_a_line = is_whole

    def _failure(self, error: OSError) -> BatchError:
        if isinstance(error, BlockingIOError):
            return BatchError(f"another process is writing {self._name}; wait for it or name another file")
        return BatchError(
            f"the results cannot be written to {self._name}: {error.strerror}; what is in it stays, and the "
            "same command goes on from there"
        )


def _open(path: str) -> IO[bytes]:
    """For appending, unbuffered, with an exclusive lock."""
    if path == "-":
        return open(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    file = open(path, "ab", buffering=0)  # noqa: SIM115 - the owner closes it
    try:
        if sys.platform != "win32" and Path(path).is_file():
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    except OSError:
        logger.warning("%s is on a file system without locks; let no other process write it", path)
    return file
