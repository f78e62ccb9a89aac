"""Kernels to put into a cache; imports no torch, since processes of the tests start with it."""

import hashlib
from pathlib import Path
from typing import Any

from halimede.kernels.store import KernelStore
from halimede.kernels.store_entry import KernelEntry

TRITON = "3.6.0"


def kernel(number: int = 0, *, target: str = "sm_90", **fields: Any) -> tuple[KernelEntry, bytes]:
    """A manifest and its binary, the same at each call."""
    binary = fields.pop("binary", f"code of {number} for {target}\n".encode() * 40)
    values: dict[str, Any] = {
        "key": hashlib.sha256(f"key {number}".encode()).hexdigest()[:32],
        "kernel": f"halimede.kernels.gpu.norm:_norm_{number}_kernel",
        "target": target,
        "signature": {"x_ptr": "*bf16:16", "size": "i32", "BLOCK": "constexpr"},
        "constants": {"BLOCK": 1024, "EPS": 1e-6, "bias_ptr": None, "GATED": False},
        "options": {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True},
        "triton": TRITON,
        "source": hashlib.sha256(b"source").hexdigest(),
        "entry_point": f"_norm_{number}_kernel",
        "threads": 128,
        "shared_memory": 4096,
        "registers": 32,
        "spills": 0,
        "sha256": hashlib.sha256(binary).hexdigest(),
        "size": len(binary),
    }
    return KernelEntry(**{**values, **fields}), binary


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder: path in it to content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def filled(folder: Path, *numbers: int, target: str = "sm_90") -> KernelStore:
    """A store of those kernels."""
    store = KernelStore(folder)
    for number in numbers:
        store.write(*kernel(number, target=target))
    return store


def write_many(folder: str, first: int, rounds: int) -> None:
    """A process that writes: 20 keys that all share and 5 of its own, over and over."""
    store = KernelStore(Path(folder))
    for _ in range(rounds):
        for number in (*range(20), *range(first, first + 5)):
            store.write(*kernel(number))
