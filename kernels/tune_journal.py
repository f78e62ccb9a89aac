"""What tuning keeps on disk: a journal of all that it measured, to go on after a stop, and the table."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from halimede.errors import KernelError
from halimede.kernels.atomic_file import write_atomically
from halimede.kernels.tune_space import Candidate
from halimede.kernels.tuning import KernelConfig, Table, read_table, table_json


class Journal:
    """Measurements by what was measured; a line of JSON each, written at once.

    path: None keeps them in memory only. resume: go on with what the file has; else it is removed. A line
    that cannot be read, such as the last one of a process that was killed, counts for nothing.
    """

    def __init__(self, path: Path | None, *, resume: bool = True) -> None:
        self._path = path
        self._known: dict[str, float | str] = {}
        if path is None:
            return
        if not resume:
            path.unlink(missing_ok=True)
        if path.exists():
            self._read(path.read_text(errors="replace"))
        path.parent.mkdir(parents=True, exist_ok=True)

    def _read(self, text: str) -> None:
        for line in text.splitlines():
            try:
                found = json.loads(line)
                key, value = found["id"], found["found"]
            except (ValueError, TypeError, KeyError):
                continue
            if isinstance(key, str) and isinstance(value, float | str):
                self._known[key] = value

    def get(self, key: str) -> float | str | None:
        """Seconds, or why there are none; None if that was not measured."""
        return self._known.get(key)

    def put(self, key: str, found: float | str, about: str) -> None:
        """about: for people who read the file. OSError if it cannot be written."""
        self._known[key] = found
        if self._path is not None:
            line = json.dumps({"id": key, "found": found, "about": about})
            with self._path.open("a") as file:
                # A line that a killed process left unfinished must not swallow this one.
                file.write(f"\n{line}" if self._is_torn() else line)
                file.write("\n")

    def _is_torn(self) -> bool:
        assert self._path is not None
        if not self._path.exists() or not self._path.stat().st_size:
            return False
        with self._path.open("rb") as file:
            file.seek(-1, 2)
            return file.read(1) != b"\n"


def measurement_id(device: str, case: str, candidate: Candidate) -> str:
    """Of a candidate for a case on a device: another source, compiler, or grid is another measurement."""
    launches = [(one.key, list(grid)) for one, grid in candidate.launches]
    return hashlib.sha256(json.dumps([device, case, launches]).encode()).hexdigest()[:32]


Chosen = Mapping[tuple[str, str, int], tuple[KernelConfig, bool]]
"""Config by kernel, key and bucket, and whether it is better than the launcher's own choice."""


def updated_table(old: Table, chosen: Chosen) -> Table:
    """The old table with what was chosen in the place of what it had there.

    A key of which any bucket is better gets a line for every bucket that was measured, its own choice too:
    the lines of the others would stand for it else. A key of which none is, gets none.
    """
    table = {kernel: {key: dict(entries) for key, entries in keys.items()} for kernel, keys in old.items()}
    for (kernel, key, bucket), (config, _) in chosen.items():
        table.setdefault(kernel, {}).setdefault(key, {})[bucket] = config
    better = {(kernel, key) for (kernel, key, _), (_, is_better) in chosen.items() if is_better}
    for kernel, key in {(kernel, key) for kernel, key, _ in chosen} - better:
        buckets = table[kernel][key]
        measured = {bucket for k, other, bucket in chosen if (k, other) == (kernel, key)}
        if buckets.keys() <= measured:
            del table[kernel][key]
    return {
        kernel: {
            key: tuple(sorted(entries.items(), key=lambda pair: pair[0])) for key, entries in keys.items()
        }
        for kernel, keys in table.items()
        if keys
    }


def update_table_file(path: Path, chosen: Chosen) -> None:
    """updated_table of a file that need not exist yet. KernelError if it is no table or cannot be written."""
    old = read_table(path) if path.exists() else MappingProxyType({})
    try:
        write_atomically(path, table_json(updated_table(old, chosen)).encode())
    except OSError as error:
        raise KernelError(
            f"the tuned table {path} cannot be written ({error}); free space there or choose another with -o"
        ) from error
