"""The GPU drivers through ctypes, on drivers that only pretend."""

import ctypes
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from stub_gpu import Gpu, StubGpu, sample_kernels

from halimede.errors import KernelError
from halimede.kernels import gpu_driver
from halimede.kernels.gpu_driver import cuda_driver, hip_driver

KIB = 1 << 10


def _in_new_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(function).result()


def _load(gpu: Gpu, **changes: Any) -> int:
    arguments = {"binary": gpu.binary, "entry_point": gpu.entry_point, "shared_memory": 0, "device": 0}
    return gpu.driver.load(**{**arguments, **changes})


def test_machine_code_from_triton_is_loaded_on_the_device_asked_for(gpu: Gpu) -> None:
    first, second = _load(gpu), _load(gpu, device=1)
    assert first
    assert second
    assert first != second
    assert [call["device"] for call in gpu.stub.calls("load")] == [0, 1]


def test_machine_code_stays_in_memory(gpu: Gpu) -> None:
    binary = bytearray(gpu.binary)
    copy = bytes(binary)
    before = sys.getrefcount(copy)
    _load(gpu, binary=copy)
    assert sys.getrefcount(copy) == before + 1


@pytest.mark.parametrize("make", [cuda_driver, hip_driver])
def test_missing_library_is_told_with_what_to_install(make: Any, tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"cannot be loaded \(.*nothing\.so.*install"):
        make(str(tmp_path / "nothing.so"))


def test_all_names_of_the_library_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def refuse(path: str) -> None:
        tried.append(path)
        raise OSError(f"no {path}")

    monkeypatch.setattr(gpu_driver, "_mapped_library", lambda name: None)
    monkeypatch.setattr(gpu_driver.ctypes, "CDLL", refuse)
    with pytest.raises(KernelError, match=r"libamdhip64\.so\.7; no libamdhip64\.so\.6.*install ROCm"):
        hip_driver()
    with pytest.raises(KernelError, match=r"no libcuda\.so\.1.*install the NVIDIA driver"):
        cuda_driver()
    assert tried == ["libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6", "libcuda.so.1"]


@pytest.mark.parametrize("make", [cuda_driver, hip_driver])
def test_library_of_something_else_is_refused(make: Any) -> None:
    with pytest.raises(KernelError, match=r"libm\.so\.6 has no .*install a newer GPU driver"):
        make("libm.so.6")


def test_hip_library_of_this_process_is_taken(hip_stub: StubGpu) -> None:
    assert gpu_driver._mapped_library("libamdhip64.so") == str(hip_stub.library)
    assert gpu_driver._mapped_library("libnothing.so") is None
    hip_driver()


def test_driver_of_a_backend_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_driver, "cuda_driver", lambda: object())
    monkeypatch.setattr(gpu_driver, "hip_driver", lambda: object())
    gpu_driver.driver_for.cache_clear()
    try:
        assert gpu_driver.driver_for("cuda") is gpu_driver.driver_for("cuda")
        assert gpu_driver.driver_for("cuda") is not gpu_driver.driver_for("hip")
    finally:
        gpu_driver.driver_for.cache_clear()


def test_no_gpu_is_told(cuda_stub: StubGpu) -> None:
    with cuda_stub.set(fail="cuInit:100"), pytest.raises(KernelError, match=r"CUDA_ERROR_NO_DEVICE.*visible"):
        cuda_driver(str(cuda_stub.library))


def test_check_gives_the_drivers_words(gpu: Gpu) -> None:
    gpu.driver.check(0, "nothing")
    with pytest.raises(KernelError) as caught:
        gpu.driver.check(700, "walking")
    name = {"cuda": "CUDA_ERROR_ILLEGAL_ADDRESS", "hip": "hipErrorIllegalAddress"}[gpu.backend]
    said = f"walking failed: the GPU driver says {name} (700, the stub's text of error 700)"
    assert str(caught.value).startswith(said)
    assert "restart it" in str(caught.value)
    with pytest.raises(KernelError, match=r"error \(998, .*dmesg"):
        gpu.driver.check(998, "walking")


_CUDA_CALLS = [
    "cuCtxGetCurrent",
    "cuDeviceGet",
    "cuDevicePrimaryCtxRetain",
    "cuCtxSetCurrent",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuFuncGetAttribute",
    "cuDeviceGetAttribute",
    "cuFuncSetCacheConfig",
    "cuFuncSetAttribute",
]
_HIP_CALLS = [
    "hipGetDevice",
    "hipSetDevice",
    "hipDeviceGetAttribute",
    "hipModuleLoadData",
    "hipModuleGetFunction",
]


@pytest.mark.parametrize("call", [*_CUDA_CALLS, *_HIP_CALLS])
def test_every_refusal_while_loading_is_told(
    call: str, cuda_stub: StubGpu, hip_stub: StubGpu, sample_codes: dict[str, Any]
) -> None:
    stub, make, target, shared = (
        (cuda_stub, cuda_driver, "sm_90", 100 * KIB)
        if call.startswith("cu")
        else (hip_stub, hip_driver, "gfx942", 1 * KIB)
    )
    code = sample_codes[target]
    driver = make(str(stub.library))
    said = rf"loading kernel every_type on GPU 1 \({call}\) failed: the GPU driver says .*\(1, "
    with stub.set(fail=f"{call}:1"), pytest.raises(KernelError, match=said):
        driver.load(sample_kernels.machine_code(code), code.name, shared, 1)


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("sm_80", "NO_BINARY_FOR_GPU"),
        ("gfx1100", "NoBinaryForGpu"),
        ("gfx942", "INVALID_IMAGE"),
        ("sm_90", "InvalidImage"),
    ],
)
def test_code_of_another_gpu_is_refused(
    target: str, error: str, cuda_stub: StubGpu, hip_stub: StubGpu, sample_codes: dict[str, Any]
) -> None:
    driver = cuda_driver(str(cuda_stub.library)) if error.isupper() else hip_driver(str(hip_stub.library))
    code = sample_codes[target]
    with pytest.raises(KernelError, match=rf"every_type on GPU 0.*{error}.*of another GPU architecture"):
        driver.load(sample_kernels.machine_code(code), code.name, 0, 0)


@pytest.mark.parametrize("binary", [b"", b"\x7fEL", b".version 8.4\n.target sm_90"])
def test_what_is_no_machine_code_never_reaches_the_driver(gpu: Gpu, binary: bytes) -> None:
    with pytest.raises(KernelError, match=rf"the {len(binary)} bytes for kernel every_type are no cubin"):
        _load(gpu, binary=binary)
    assert gpu.stub.calls("load") == []


def test_missing_function_is_told(gpu: Gpu) -> None:
    with pytest.raises(KernelError, match=r"other_kernel on GPU 0.*no function of that name"):
        _load(gpu, entry_point="other_kernel")


def test_device_that_is_not_there_is_told(gpu: Gpu) -> None:
    with pytest.raises(KernelError, match=r"on GPU 7.*CUDA_VISIBLE_DEVICES"):
        _load(gpu, device=7)


@pytest.mark.parametrize("gpu", ["cuda"], indirect=True)
def test_cuda_shared_memory_is_allowed_where_the_gpu_has_it(gpu: Gpu) -> None:
    _load(gpu, shared_memory=48 * KIB)
    assert gpu.stub.calls("allow_shared") == []
    _load(gpu, shared_memory=48 * KIB + 1)
    with gpu.stub.set(static_shared="1024"):
        _load(gpu, shared_memory=48 * KIB - 1024)
        _load(gpu, shared_memory=48 * KIB - 1023)
        _load(gpu, shared_memory=226 * KIB)
    assert [call["bytes"] for call in gpu.stub.calls("allow_shared")] == [227 * KIB, 226 * KIB, 226 * KIB]
    assert [call["config"] for call in gpu.stub.calls("cache_config")] == [1, 1, 1]


def test_more_shared_memory_than_there_is_is_refused(gpu: Gpu) -> None:
    most = 226 * KIB if gpu.backend == "cuda" else 64 * KIB
    with (
        gpu.stub.set(static_shared="1024"),
        pytest.raises(KernelError, match=rf"needs {most + 1} bytes of shared memory.* has {most};"),
    ):
        _load(gpu, shared_memory=most + 1)
    assert gpu.stub.calls("allow_shared") == []


def _current_device(stub: StubGpu) -> int | None:
    """The device of the thread's CUDA context, asked of the driver itself."""
    device = ctypes.c_int()
    code = ctypes.CDLL(str(stub.library)).cuCtxGetDevice(ctypes.byref(device))
    return device.value if code == 0 else None


def test_thread_without_a_context_gets_the_devices(cuda_stub: StubGpu, sample_codes: dict[str, Any]) -> None:
    driver = cuda_driver(str(cuda_stub.library))
    code = sample_codes["sm_90"]
    binary = sample_kernels.machine_code(code)

    def load() -> tuple[Any, ...]:
        before = _current_device(cuda_stub)
        driver.load(binary, code.name, 0, 1)
        return before, _current_device(cuda_stub)

    assert _in_new_thread(load) == (None, 1)


def test_context_of_a_thread_is_there_again(cuda_stub: StubGpu, sample_codes: dict[str, Any]) -> None:
    driver = cuda_driver(str(cuda_stub.library))
    code = sample_codes["sm_90"]
    binary = sample_kernels.machine_code(code)

    def load() -> list[int | None]:
        driver.load(binary, code.name, 0, 1)
        driver.load(binary, code.name, 0, 0)
        after_success = _current_device(cuda_stub)
        with pytest.raises(KernelError):
            driver.load(binary, "other_kernel", 0, 0)
        return [after_success, _current_device(cuda_stub)]

    assert _in_new_thread(load) == [1, 1]
    assert [call["device"] for call in cuda_stub.calls("load")] == [1, 0, 0]


def test_only_a_thread_without_a_context_is_prepared(
    cuda_stub: StubGpu, sample_codes: dict[str, Any]
) -> None:
    driver = cuda_driver(str(cuda_stub.library))
    code = sample_codes["sm_90"]
    function = driver.load(sample_kernels.machine_code(code), code.name, 0, 1)

    def prepare() -> tuple[Any, ...]:
        return driver.prepare_thread(function), _current_device(cuda_stub), driver.prepare_thread(function)

    assert _in_new_thread(prepare) == (True, 1, False)


def test_hip_device_of_a_thread_is_there_again(hip_stub: StubGpu, sample_codes: dict[str, Any]) -> None:
    driver = hip_driver(str(hip_stub.library))
    code = sample_codes["gfx942"]
    binary = sample_kernels.machine_code(code)
    stub, device = ctypes.CDLL(str(hip_stub.library)), ctypes.c_int(-1)
    function = driver.load(binary, code.name, 0, 1)
    stub.hipGetDevice(ctypes.byref(device))
    assert device.value == 0
    with pytest.raises(KernelError):
        driver.load(binary, "other_kernel", 0, 1)
    stub.hipGetDevice(ctypes.byref(device))
    assert device.value == 0
    assert not driver.prepare_thread(function)


def test_hip_error_is_not_left_for_torch(hip_stub: StubGpu, sample_codes: dict[str, Any]) -> None:
    driver = hip_driver(str(hip_stub.library))
    with pytest.raises(KernelError):
        driver.load(sample_kernels.machine_code(sample_codes["gfx942"]), "other_kernel", 0, 0)
    assert ctypes.CDLL(str(hip_stub.library)).hipGetLastError() == 0


def test_current_stream_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError, match="knows no GPUs"):
        gpu_driver._no_gpu(0)
    monkeypatch.setattr(gpu_driver, "_raw_stream", lambda device: 1000 + device)
    assert gpu_driver.current_stream(3) == 1003
