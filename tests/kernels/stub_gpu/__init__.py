"""GPU drivers that only pretend, in C: what is launched on them is written down. For tests without a GPU.

    library = build_stub("cuda", folder)            # folder/libcuda.so.1; needs a C compiler
    stub = StubGpu(library, log=folder / "log")
    stub.tell_parameters("my_kernel", [8, 4, 8, 8])
    ...
    stub.launches()

The same file serves Triton's own driver (see real_driver.py). Settings are environment variables:
STUB_GPU_LOG (a file), STUB_GPU_ARCH ("90", "gfx942"), STUB_GPU_STATIC_SHARED (bytes that every kernel
declares), STUB_GPU_FAIL ("cuLaunchKernel:700", or "cuLaunchKernel:700:once"). Call reload after a change.
"""

import contextlib
import ctypes
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import triton.backends

from halimede.kernels.gpu_driver import GpuDriver

Backend = Literal["cuda", "hip"]
_SOURCES = Path(__file__).parent
_LIBRARIES = {
    "cuda": ("stub_cuda.c", "libcuda.so.1", "nvidia"),
    "hip": ("stub_hip.c", "libamdhip64.so", "amd"),
}


def has_compiler() -> bool:
    """Whether there is a C compiler to build the drivers with."""
    return shutil.which("cc") is not None


def build_stub(backend: Backend, folder: Path) -> Path:
    """The driver's library, built into the folder, under the name that the real one has."""
    source, name, vendor = _LIBRARIES[backend]
    headers = Path(triton.backends.__file__).parent / vendor / "include"
    library = folder / name
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-unused-function"]
    options = ["-O2", "-shared", "-fPIC", *warnings, f"-Wl,-soname,{name},-Bsymbolic", "-isystem", headers]
    subprocess.run(["cc", *options, _SOURCES / source, "-o", library, "-ldl"], check=True)
    return library


@dataclass(frozen=True)
class StubLaunch:
    """What the driver was given. parameters: the bytes of each, as hexadecimal digits."""

    function: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    stream: int
    device: int
    parameters: tuple[str, ...]


class StubGpu:
    """A built driver in this process, and its log."""

    def __init__(self, library: Path, log: Path) -> None:
        self.library = library
        self.log = log
        self._stub = ctypes.CDLL(str(library))

    def tell_parameters(self, function: str, sizes: Sequence[int]) -> None:
        """The sizes in bytes of all that a kernel takes; its launches are then logged with the values."""
        self._stub.stub_gpu_parameters(function.encode(), len(sizes), (ctypes.c_int * len(sizes))(*sizes))

    def reload(self) -> None:
        """Read the environment variables again."""
        self._stub.stub_gpu_reload()

    def forget_thread(self) -> None:
        """Make this thread one that has not used the GPU yet."""
        if "cuda" in self.library.name:
            self._stub.cuCtxSetCurrent(None)
        else:
            self._stub.hipSetDevice(0)

    @contextlib.contextmanager
    def set(self, **settings: str) -> Iterator[None]:
        """Settings for the time of the block: `fail`, `arch`, `static_shared`, `log`."""
        before = dict(os.environ)
        os.environ.update({f"STUB_GPU_{name.upper()}": value for name, value in settings.items()})
        self.reload()
        try:
            yield
        finally:
            for name in settings:
                os.environ.pop(f"STUB_GPU_{name.upper()}")
            os.environ.update(before)
            self.reload()

    def calls(self, name: str) -> list[dict[str, Any]]:
        """What the log has of one kind: "launch", "load", "allow_shared", "cache_config"."""
        if not self.log.exists():
            return []
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [line for line in lines if line.pop("call") == name]

    def launches(self) -> list[StubLaunch]:
        """All launches so far, in order."""
        return [
            StubLaunch(**{key: tuple(v) if isinstance(v, list) else v for key, v in call.items()})
            for call in self.calls("launch")
        ]


@dataclass(frozen=True)
class Gpu:
    """A pretended GPU: code of a kernel for it, and what is called otherwise on another one.

    launch_call: the driver's function that launches. warp_size: threads.
    """

    backend: Backend
    stub: StubGpu
    driver: GpuDriver
    binary: bytes
    entry_point: str
    launch_call: str
    warp_size: int


def parameter_sizes(compiled: Any) -> list[int]:
    """The sizes in bytes of all that a kernel takes, from the text of its code (Triton's CompiledKernel)."""
    if "ptx" in compiled.asm:
        entry = compiled.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0]
        return [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", entry)]
    arguments = compiled.asm["amdgcn"].split(".args:", 1)[1].split(".group_segment", 1)[0]
    shown = re.findall(r"\.size:\s+(\d+)\s+\.value_kind:\s+(\w+)", arguments)
    return [int(size) for size, kind in shown if not kind.startswith("hidden")]
