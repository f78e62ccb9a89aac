"""The input file: one request per line, read line by line.

A first pass over the file, before any model is loaded, decides for each line whether it is to be run. What
stays of it in memory is one byte per line.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import IO, Any

from halimede.engine.batch.results import FinishedLines
from halimede.engine.openai.errors import ApiError
from halimede.errors import BatchError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class _Status(IntEnum):
    RUN = 0
    DUPLICATE = 1
    FINISHED = 2
    BLANK = 3


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One line that is to be run. number: from 1. is_duplicate: an earlier line has its custom_id."""

    number: int
    data: bytes
    is_duplicate: bool


class BatchInput:
    """An open input file, and which of its lines are to be run.

    num_lines: those that are not blank. num_finished: of these, those that have a result already.
    Raises BatchError for a file without requests, or if there are results of requests that are not in it.
    """

    def __init__(self, file: IO[bytes], finished: FinishedLines) -> None:
        self._file = file
        self._statuses = bytearray()
        seen: set[str] = set()
        for number, data in _read(file):
            self._statuses.append(_status(number, data, seen, finished))
        others = finished.custom_ids - seen
        if others:
            raise BatchError(
                f"{finished.path} has the results of other requests: custom_id {min(others)!r} is not in the "
                "input; name another file for the results, or overwrite this one"
            )
        self.num_lines = len(self._statuses) - self._statuses.count(_Status.BLANK)
        if not self.num_lines:
            raise BatchError("the input has no requests; give one per line")
        self.num_finished = self._statuses.count(_Status.FINISHED)

    def __iter__(self) -> Iterator[BatchLine]:
        """The lines to run, in order, read as they are asked for."""
        for (number, data), status in zip(_read(self._file), self._statuses, strict=False):
            if status in (_Status.RUN, _Status.DUPLICATE):
                yield BatchLine(number, data, status == _Status.DUPLICATE)


def open_input(path: str) -> IO[bytes]:
    """The file, or a copy on disk of what cannot be read twice, such as a pipe. BatchError if unreadable."""
    source = Path("/dev/stdin" if path == "-" else path)
    try:
        file = source.open("rb")
        if source.is_file():
            return file
        with file:
            copy = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
            shutil.copyfileobj(file, copy)
            return copy
    except OSError as error:
        raise BatchError(f"the input {path} cannot be read: {error.strerror}; check the path") from error


def parse_line(data: bytes) -> dict[str, Any]:
    """The line's object. ApiError for a line that is not strict JSON in UTF-8, or no object."""
    try:
        record = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # of which UnicodeDecodeError and JSONDecodeError are
        raise ApiError(f"the line is not valid JSON: {error}", code="invalid_json_line") from error
    if not isinstance(record, dict):
        raise ApiError(
            f"the line is a JSON {type(record).__name__}; it must be an object with custom_id, method, url "
            "and body",
            code="invalid_json_line",
        )
    return record


def custom_id_of(record: dict[str, Any]) -> str:
    """The record's custom_id. ApiError if it has none, or one that is no text."""
    custom_id = record.get("custom_id")
    if isinstance(custom_id, str) and custom_id:
        return custom_id
    raise ApiError(
        "custom_id is missing; give each line one of its own"
        if custom_id in (None, "")
        else f"custom_id is {custom_id!r}; it must be a string",
        param="custom_id",
        code="missing_required_parameter" if custom_id in (None, "") else "invalid_type",
    )


def _read(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    file.seek(0)
    for number, data in enumerate(file, 1):
        yield number, data.removeprefix(_BYTE_ORDER_MARK) if number == 1 else data


def _status(number: int, data: bytes, seen: set[str], finished: FinishedLines) -> _Status:
    if not data.strip():
        return _Status.BLANK
    try:
        custom_id = custom_id_of(parse_line(data))
    except ApiError:
        return _Status.FINISHED if number in finished.line_numbers else _Status.RUN
    if custom_id in seen:
        return _Status.FINISHED if number in finished.line_numbers else _Status.DUPLICATE
    seen.add(custom_id)
    return _Status.FINISHED if custom_id in finished.custom_ids else _Status.RUN


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
