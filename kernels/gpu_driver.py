"""The GPU driver, called through ctypes: loads machine code and gives the function that launches it.

Triton's own driver builds C modules at its first use, so it needs a C compiler where the engine runs. What
is compiled ahead needs neither: libcuda.so.1 and libamdhip64.so are there with every GPU, and the dozen
functions used here have kept their form since CUDA 11 and ROCm 6.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_uint, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from halimede.errors import KernelError

_OUT_POINTER = POINTER(c_void_p)
_OUT_INT = POINTER(c_int)

# cuda.h: attributes of devices and functions, and a cache preference.
_CU_DEVICE_SHARED_OPTIN, _CU_FUNC_SHARED_STATIC, _CU_FUNC_MAX_DYNAMIC_SHARED, _CU_PREFER_SHARED = 97, 1, 8, 1
# Bytes of shared memory that every CUDA kernel may use without asking.
_CU_SHARED_WITHOUT_OPTIN = 48 << 10
# hip_runtime_api.h: hipDeviceAttributeMaxSharedMemoryPerBlock.
_HIP_DEVICE_SHARED = 74
_ELF = b"\x7fELF"

_Signatures = Mapping[str, tuple[Any, ...] | None]
_CUDA_SIGNATURES: _Signatures = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGet": (_OUT_INT, c_int),
    "cuDeviceGetAttribute": (_OUT_INT, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_OUT_POINTER, c_int),
    "cuCtxGetCurrent": (_OUT_POINTER,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuModuleLoadData": (_OUT_POINTER, c_char_p),
    "cuModuleGetFunction": (_OUT_POINTER, c_void_p, c_char_p),
    "cuFuncGetAttribute": (_OUT_INT, c_int, c_void_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuFuncSetCacheConfig": (c_void_p, c_int),
    "cuLaunchKernel": None,  # see GpuDriver.launch_function
}
_HIP_SIGNATURES: _Signatures = {
    "hipGetErrorName": (c_int,),
    "hipGetErrorString": (c_int,),
    "hipGetLastError": (),
    "hipGetDevice": (_OUT_INT,),
    "hipSetDevice": (c_int,),
    "hipDeviceGetAttribute": (_OUT_INT, c_int, c_int),
    "hipModuleLoadData": (_OUT_POINTER, c_char_p),
    "hipModuleGetFunction": (_OUT_POINTER, c_void_p, c_char_p),
    "hipModuleLaunchKernel": None,
}

_CUDA_REMEDY = "install the NVIDIA driver, and in a container start it with its GPUs (`--gpus all`)"
_HIP_REMEDY = "install ROCm 6 or newer, or a torch built for ROCm, and import torch first"
_OTHER_GPU = "the machine code is damaged or of another GPU architecture: compile the kernels for this GPU"
_OTHER_DEVICE = "the thread's current device is not the one that the kernel was loaded on: switch to it"
_BROKEN = (
    "this kernel or one before it failed on the GPU, and the process can use the GPU no more: restart it"
)
# The two drivers give these errors the same numbers.
_REMEDIES: Mapping[int, str] = {
    1: "a size, a pointer or the shared memory is not what the GPU takes",
    2: "the GPU's memory is full: lower gpu_memory_utilization, or end what else uses the GPU",
    3: "a process that was forked after the GPU was used cannot use it: start it with spawn",
    98: _OTHER_GPU,
    100: "no GPU is visible: look at nvidia-smi or rocm-smi, CUDA_VISIBLE_DEVICES and HIP_VISIBLE_DEVICES",
    101: "the device's number is too large: look at CUDA_VISIBLE_DEVICES and HIP_VISIBLE_DEVICES",
    200: _OTHER_GPU,
    201: _OTHER_DEVICE,
    209: _OTHER_GPU,
    218: _OTHER_GPU,
    400: _OTHER_DEVICE,
    500: "the machine code has no function of that name: compile the kernels again",
    700: _BROKEN,
    701: "the kernel needs more registers or threads than the GPU has: compile it with fewer warps",
    719: _BROKEN,
}
_UNKNOWN_REMEDY = "look for messages of the GPU driver (dmesg), and report this"


class GpuDriver(Protocol):
    """What loading and launching a kernel needs of a GPU driver. Any thread may call any of it."""

    @property
    def launch_function(self) -> Any:
        """cuLaunchKernel or hipModuleLaunchKernel, which take the same arguments; returns the error's number.

        It converts nothing: integers pass as C ints, and every pointer must be a ctypes parameter object
        (`c_void_p.from_param(address)`). With declared argument types a call would take 1.6 µs, not 0.6.
        """

    def load(self, binary: bytes, entry_point: str, shared_memory: int, device: int) -> int:
        """The handle of a kernel of `binary`, on the GPU with that number. What is loaded stays loaded.

        binary: a cubin or hsaco. shared_memory: bytes that each block gets besides what the code declares.
        The device and context that the thread has are the same afterwards; a thread that had no CUDA context
        has the device's. KernelError if the GPU has too little shared memory or the driver refuses.
        """

    def check(self, code: int, doing: str) -> None:
        """KernelError if `code`, the result of a driver's function, is an error; `doing`: what it was for.

        The message holds the driver's name and text of the error, and a remedy.
        """

    def prepare_thread(self, function: int) -> bool:
        """Whether to try a refused launch of the function again: the thread had no context and now has one.

        A thread that has not used the GPU yet has none. Asking before every launch would cost more.
        """


class _Cuda:
    def __init__(self, path: str) -> None:
        self._driver = _bind(_open([path], _CUDA_REMEDY), _CUDA_SIGNATURES)
        self.launch_function = self._driver["cuLaunchKernel"]
        self._contexts: dict[int, int] = {}
        self._devices: dict[int, int] = {}
        self._binaries: list[bytes] = []
        self._call("cuInit", 0, doing="starting the GPU driver")

    def load(self, binary: bytes, entry_point: str, shared_memory: int, device: int) -> int:
        _require_machine_code(binary, entry_point)
        doing = f"loading kernel {entry_point} on GPU {device}"
        # The driver's documentation does not promise that it copies the code.
        self._binaries.append(binary)
        with self._context(device, doing):
            module, function = c_void_p(), c_void_p()
            self._call("cuModuleLoadData", byref(module), binary, doing=doing)
            self._call("cuModuleGetFunction", byref(function), module, entry_point.encode(), doing=doing)
            self._allow_shared_memory(function, shared_memory, device, doing)
        assert function.value is not None, "a driver gave no function, and no error"
        self._devices[function.value] = device
        return function.value

    def check(self, code: int, doing: str) -> None:
        if code:
            name, text = c_char_p(), c_char_p()
            self._driver["cuGetErrorName"](code, byref(name))
            self._driver["cuGetErrorString"](code, byref(text))
            raise _refusal(code, name.value, text.value, doing)

    def prepare_thread(self, function: int) -> bool:
        doing = "preparing a thread to launch kernels"
        if self._current_context(doing) is not None:
            return False
        self._call("cuCtxSetCurrent", self._primary_context(self._devices[function], doing), doing=doing)
        return True

    def _call(self, name: str, *arguments: Any, doing: str) -> None:
        self.check(self._driver[name](*arguments), f"{doing} ({name})")

    def _current_context(self, doing: str) -> int | None:
        context = c_void_p()
        self._call("cuCtxGetCurrent", byref(context), doing=doing)
        return context.value

    def _primary_context(self, device: int, doing: str) -> int:
        """The context of the device that torch uses too. It is taken once and kept until the process ends."""
        if device not in self._contexts:
            handle, context = c_int(), c_void_p()
            self._call("cuDeviceGet", byref(handle), device, doing=doing)
            self._call("cuDevicePrimaryCtxRetain", byref(context), handle, doing=doing)
            assert context.value is not None, "a driver gave no context, and no error"
            self._contexts[device] = context.value
        return self._contexts[device]

    @contextlib.contextmanager
    def _context(self, device: int, doing: str) -> Iterator[None]:
        before = self._current_context(doing)
        self._call("cuCtxSetCurrent", self._primary_context(device, doing), doing=doing)
        try:
            yield
        finally:
            if before is not None:
                self._call("cuCtxSetCurrent", before, doing=doing)

    def _allow_shared_memory(self, function: c_void_p, num_bytes: int, device: int, doing: str) -> None:
        """Lets the function be launched with that much shared memory, more than the 48 KiB that all have."""
        static, most, handle = c_int(), c_int(), c_int()
        # Asked in any case: a driver that loads lazily then loads the function now, not inside a CUDA graph.
        self._call("cuFuncGetAttribute", byref(static), _CU_FUNC_SHARED_STATIC, function, doing=doing)
        if num_bytes + static.value <= _CU_SHARED_WITHOUT_OPTIN:
            return
        self._call("cuDeviceGet", byref(handle), device, doing=doing)
        self._call("cuDeviceGetAttribute", byref(most), _CU_DEVICE_SHARED_OPTIN, handle, doing=doing)
        available = most.value - static.value
        _require_shared_memory(num_bytes, available, doing)
        self._call("cuFuncSetCacheConfig", function, _CU_PREFER_SHARED, doing=doing)
        self._call("cuFuncSetAttribute", function, _CU_FUNC_MAX_DYNAMIC_SHARED, available, doing=doing)


class _Hip:
    def __init__(self, paths: Sequence[str]) -> None:
        self._driver = _bind(_open(paths, _HIP_REMEDY), _HIP_SIGNATURES)
        for name in ("hipGetErrorName", "hipGetErrorString"):
            self._driver[name].restype = c_char_p
        self.launch_function = self._driver["hipModuleLaunchKernel"]
        self._binaries: list[bytes] = []

    def load(self, binary: bytes, entry_point: str, shared_memory: int, device: int) -> int:
        _require_machine_code(binary, entry_point)
        doing = f"loading kernel {entry_point} on GPU {device}"
        self._binaries.append(binary)
        with self._device(device, doing):
            most, module, function = c_int(), c_void_p(), c_void_p()
            self._call("hipDeviceGetAttribute", byref(most), _HIP_DEVICE_SHARED, device, doing=doing)
            _require_shared_memory(shared_memory, most.value, doing)
            self._call("hipModuleLoadData", byref(module), binary, doing=doing)
            self._call("hipModuleGetFunction", byref(function), module, entry_point.encode(), doing=doing)
        assert function.value is not None, "a driver gave no function, and no error"
        return function.value

    def check(self, code: int, doing: str) -> None:
        if code:
            # HIP keeps the error for whoever asks next. That is torch, which would blame its own next step.
            self._driver["hipGetLastError"]()
            name, text = self._driver["hipGetErrorName"](code), self._driver["hipGetErrorString"](code)
            raise _refusal(code, name, text, doing)

    def prepare_thread(self, function: int) -> bool:
        return False  # every thread starts with device 0

    def _call(self, name: str, *arguments: Any, doing: str) -> None:
        self.check(self._driver[name](*arguments), f"{doing} ({name})")

    @contextlib.contextmanager
    def _device(self, device: int, doing: str) -> Iterator[None]:
        before = c_int()
        self._call("hipGetDevice", byref(before), doing=doing)
        self._call("hipSetDevice", device, doing=doing)
        try:
            yield
        finally:
            self._call("hipSetDevice", before, doing=doing)


def cuda_driver(library: str | None = None) -> GpuDriver:
    """The driver of NVIDIA's GPUs, of libcuda.so.1 or the file given.

    KernelError if it is missing or too old, or finds no GPU.
    """
    return _Cuda(library or "libcuda.so.1")


def hip_driver(library: str | None = None) -> GpuDriver:
    """The driver of AMD's GPUs: the file given, or the libamdhip64.so that torch loaded, or the system's.

    KernelError if there is none, or it is too old. (Two in one process would not know each other's streams.)
    """
    if library is None:
        library = _mapped_library("libamdhip64.so")
    return _Hip([library] if library else ["libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6"])


@cache
def driver_for(backend: Literal["cuda", "hip"]) -> GpuDriver:
    """The process's driver of that backend; KernelError as cuda_driver and hip_driver."""
    return hip_driver() if backend == "hip" else cuda_driver()


def _no_gpu(device: int) -> int:
    raise KernelError(f"torch {torch.__version__} knows no GPUs; install one that is built for CUDA or ROCm")


# What torch.cuda.current_stream wraps in an object. Triton takes its streams from here, too.
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _no_gpu)


def current_stream(device: int) -> int:
    """The handle of the stream that torch works on, on the GPU with that number, in this thread.

    KernelError if this torch is built without GPUs.
    """
    return _raw_stream(device)


def _mapped_library(name: str) -> str | None:
    """The path of a library whose file's name begins so and that this process has loaded."""
    try:
        lines = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    paths = (line.split(maxsplit=5)[5] for line in lines if line.count("/"))
    return next((path for path in paths if path.rpartition("/")[2].startswith(name)), None)


def _open(paths: Sequence[str], remedy: str) -> ctypes.CDLL:
    problems = []
    for path in paths:
        try:
            # Releases Python's lock during a call: a launch waits while the GPU's queue is full, and what the
            # GPU waits for may be another thread's. Keeping the lock would save 0.05 µs a launch.
            return ctypes.CDLL(path)
        except OSError as error:
            problems.append(str(error))
    raise KernelError(f"the GPU driver's library cannot be loaded ({'; '.join(problems)}); {remedy}")


def _bind(library: ctypes.CDLL, signatures: _Signatures) -> dict[str, Any]:
    functions: dict[str, Any] = {}
    for name, argument_types in signatures.items():
        try:
            functions[name] = library[name]  # an object of our own, unlike library.name
        except AttributeError as error:
            raise KernelError(f"{library._name} has no {name}; install a newer GPU driver") from error
        functions[name].argtypes = argument_types
        functions[name].restype = c_int
    return functions


def _require_machine_code(binary: bytes, entry_point: str) -> None:
    # A driver is given no length: what is not the start of an ELF file might be read far beyond its end.
    if binary[:4] != _ELF:
        raise KernelError(
            f"the {len(binary)} bytes for kernel {entry_point} are no cubin or hsaco: they start with "
            f"{binary[:4]!r}, not {_ELF!r}; compile the kernels again"
        )


def _require_shared_memory(needed: int, available: int, doing: str) -> None:
    if needed > available:
        raise KernelError(
            f"{doing} failed: it needs {needed} bytes of shared memory in each block, and the GPU has "
            f"{available}; compile the kernel for this GPU, or with smaller blocks or fewer stages"
        )


def _refusal(code: int, name: bytes | None, text: bytes | None, doing: str) -> KernelError:
    said = f"{(name or b'error').decode()} ({code}, {(text or b'no description').decode()})"
    return KernelError(f"{doing} failed: the GPU driver says {said}; {_REMEDIES.get(code, _UNKNOWN_REMEDY)}")
