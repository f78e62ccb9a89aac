"""The manifest of one kernel in the cache: what it holds, its JSON, and the names of files that it may give.

The JSON is indented and sorted, to be read and compared by people. Its field "digest" is the SHA-256 of all
other fields, written without spaces, so that a flipped bit in the manifest itself is noticed. Digests find
damage, not malice: whoever may write the cache decides what runs on the GPU.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, NoReturn

FORMAT = 1
"""Of the folders and manifests; the folder of each is v<number>."""

TRITON_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+_-]{0,62}")
TARGET_NAME = re.compile(r"sm_[0-9]{2,4}[a-z]?|gfx[0-9a-f]{2,6}")
KEY_NAME = re.compile(r"[0-9a-f]{32}")
FILE_NAME = re.compile(r"([0-9a-f]{32})\.(json|cubin|hsaco)")

_SHA256 = re.compile(r"[0-9a-f]{64}")
# Of functions: printable, so that a manifest from elsewhere cannot reprogram the terminal it is shown on.
_FUNCTION = re.compile(r"[!-~]{1,512}")
_PATTERNS = {
    "key": KEY_NAME,
    "kernel": _FUNCTION,
    "target": TARGET_NAME,
    "triton": TRITON_NAME,
    "source": _SHA256,
    "entry_point": _FUNCTION,
    "sha256": _SHA256,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelEntry:
    """The manifest of one kernel.

    key: 32 hex digits that name it. kernel: "halimede.kernels.gpu.norm:_rms_norm_kernel". target: "sm_90",
    "gfx942". signature: parameter to Triton's type, "*bf16:16"; on disk it is sorted, so the order of the
    parameters is not kept. constants, options (the compiler's): JSON scalars. triton: its version. source:
    SHA-256 of the kernel's source. entry_point: the function's name in the binary. threads: of one program.
    shared_memory: bytes of one program. registers: of a thread. spills: bytes of a thread. sha256, size: of
    the binary, in bytes. scratch_bytes: of global memory that a launch gives each program, from an address
    that is a multiple of scratch_align; manifests of before there were such kernels have neither.
    """

    key: str
    kernel: str
    target: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    triton: str
    source: str
    entry_point: str
    threads: int
    shared_memory: int
    registers: int
    spills: int
    sha256: str
    size: int
    scratch_bytes: int = 0
    scratch_align: int = 1

    @property
    def manifest_name(self) -> str:
        """The file of the manifest, without its folder."""
        return f"{self.key}.json"

    @property
    def binary_name(self) -> str:
        """The file of the binary, in the manifest's folder. Kernels with the same code share it."""
        return f"{self.sha256[:32]}.{'cubin' if self.target.startswith('sm_') else 'hsaco'}"

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return {
            f.name: value if isinstance(value := getattr(self, f.name), str | int) else dict(value)
            for f in fields(self)
        }


def write_manifest(entry: KernelEntry) -> bytes:
    """The manifest's file. Raises ValueError: a field is no JSON scalar or no name that a file may have."""
    values = entry.as_json()
    for name in ("signature", "constants", "options"):
        for key, value in values[name].items():
            if not isinstance(key, str) or not _is_scalar(value):
                raise ValueError(f"holds {key!r}: {value!r} in its {name}, which is no scalar of JSON")
    _check_names(values)
    values["digest"] = _digest(values)
    return (json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def read_manifest(data: bytes) -> KernelEntry:
    """What `write_manifest` wrote. Fields that it does not know are left out.

    Raises ValueError that says what is wrong, as the end of a sentence about the file.
    """
    try:
        values = json.loads(data.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from error
    if not isinstance(values, dict) or "digest" not in values:
        raise ValueError("is not the manifest of a kernel: it has no digest")
    if values.pop("digest") != _digest(values):
        raise ValueError("was altered: its fields do not fit its digest")
    known = {f.name: f for f in fields(KernelEntry)}
    for name, field in known.items():
        if name not in values and field.default is MISSING:
            raise ValueError(f"lacks the field {name!r}")
        if name in values and not _is_a(values[name], field.type):
            raise ValueError(f"holds {name}={values[name]!r}, which is of another type")
    _check_names(values)
    return KernelEntry(**{name: values[name] for name in known if name in values})


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_a(value: object, kind: object) -> bool:
    if kind in (str, int):
        return type(value) is kind  # not isinstance: True is an int
    return isinstance(value, dict)


def _is_scalar(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int)


def _check_names(values: Mapping[str, Any]) -> None:
    for name, pattern in _PATTERNS.items():
        if not pattern.fullmatch(values[name]):
            raise ValueError(f"holds {name}={values[name]!r}, which is not the name of one")


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not of JSON")
