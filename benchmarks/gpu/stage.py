"""What the stages have in common: arguments, and results that are on the disk as soon as they are there."""

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rehearsal import REHEARSAL
from timing import describe

CONTEXT_LOST = 3
"""Exit status of a process whose GPU no longer answers: after an illegal access every call of it fails."""


def stage_arguments(description: str | None) -> argparse.ArgumentParser:
    """--output and --device; "cpu" is a rehearsal: tiny shapes, kernels interpreted."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    return parser


def gpu_answers(device: torch.device) -> bool:
    """Whether what was launched has ended well; if not, nothing runs any more in this process."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


class Results:
    """The JSON of a stage. `failures` lists what went wrong, `status` says whether anything did.

    resume: go on with the file of an earlier process of the same stage.
    """

    def __init__(self, output: Path, device: torch.device, *, resume: bool = False, **facts: Any) -> None:
        self.output, self._device = output, device
        self.rehearsal = device.type == "cpu"
        self.data: dict[str, Any] = {}
        if resume:
            self.reload()
            return
        self.data = {"machine": describe(device), **facts, "notes": [], "failures": []}
        if self.rehearsal:
            self.data = {"rehearsal": REHEARSAL, **self.data}
            print(REHEARSAL, flush=True)
        self._write()

    def reload(self) -> None:
        """Take what another process of this stage has written."""
        self.data = json.loads(self.output.read_text())

    def put(self, name: str, value: Any) -> None:
        self.data[name] = value
        self._write()

    def add(self, name: str, row: Any) -> None:
        """Append to the list of that name."""
        self.data.setdefault(name, []).append(row)
        self._write()

    def note(self, text: str) -> None:
        """Something that a reader must know, such as what was left out."""
        print(text, flush=True)
        self.add("notes", text)

    def fail(self, what: str, error: str) -> None:
        print(f"FAILED {what}: {error.splitlines()[0] if error else ''}", flush=True)
        self.add("failures", {"what": what, "error": error[:2000]})

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """What raises inside is written down and leaves the rest alone.

        SystemExit(CONTEXT_LOST) where the GPU does not answer after it: what followed would fail for that.
        """
        try:
            yield
        except Exception as error:
            self.fail(what, f"{type(error).__name__}: {error}")
            if not gpu_answers(self._device):
                self.note(f"the GPU does not answer any more after {what}: this process ends here")
                raise SystemExit(CONTEXT_LOST) from error

    @property
    def status(self) -> int:
        """For sys.exit."""
        return 1 if self.data["failures"] else 0

    def _write(self) -> None:
        # Renamed when it is whole: a stage may be killed at any time.
        partial = self.output.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1))
        os.replace(partial, self.output)
