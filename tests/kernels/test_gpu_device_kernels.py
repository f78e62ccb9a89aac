"""Launches on a device: which code is loaded for which arguments, and what arrives there."""

from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from stub_gpu import StubGpu

from halimede.errors import KernelError
from halimede.kernels import launch as launch_module
from halimede.kernels.device_kernels import DeviceKernels
from halimede.kernels.gpu.norm import rms_norm
from halimede.kernels.gpu_driver import cuda_driver, hip_driver
from halimede.kernels.launch import Launch, Variant, intercepting, launch
from halimede.kernels.launch_plan import Allocate, device_memory
from halimede.kernels.library import KernelLibrary, current_library, using
from halimede.kernels.store import KernelStore
from halimede.kernels.target import TARGETS
from halimede.kernels.tuning import KernelConfig

CONFIG = KernelConfig({"BLOCK": 64}, num_warps=1, num_stages=1)


@triton.jit(do_not_specialize=["size"])
def _fill_kernel(x_ptr, y_ptr, value: tl.float32, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = value
    if y_ptr is not None:
        y += tl.load(y_ptr + at, mask=at < size)
    tl.store(x_ptr + at, y, mask=at < size)


@triton.jit
def _careless_kernel(x_ptr, size, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 0.0, mask=tl.arange(0, BLOCK) < size)


@pytest.fixture
def library(tmp_path: Path) -> KernelLibrary:
    return KernelLibrary(KernelStore(tmp_path / "cache"))


def device(
    library: KernelLibrary, stub: StubGpu, target: str, allocate: Allocate = device_memory
) -> DeviceKernels:
    def start(index: int, launch: Any, grid: Any, values: Any) -> None:
        assert index == 0
        launch(grid, 77, values)

    driver = (cuda_driver if target.startswith("sm") else hip_driver)(str(stub.library))
    return DeviceKernels(library, TARGETS[target], driver, index=0, start=start, allocate=allocate)


def fill(kernels: DeviceKernels, x: torch.Tensor, y: torch.Tensor | None, size: int = 5) -> None:
    kernels.launch(_fill_kernel, (2, 1, 1), (x, y, 1.5, size), CONFIG, {"BLOCK": 64})


def test_arguments_arrive_and_none_is_left_out(library: KernelLibrary, cuda_stub: StubGpu) -> None:
    kernels = device(library, cuda_stub, "sm_90")
    x, y = torch.zeros(128), torch.zeros(128)
    cuda_stub.tell_parameters("_fill_kernel", [8, 8, 4, 4, 8, 8])
    fill(kernels, x, y)
    cuda_stub.tell_parameters("_fill_kernel", [8, 4, 4, 8, 8])
    fill(kernels, x, None, 7)
    with_y, without = cuda_stub.launches()
    assert (with_y.grid, with_y.block, with_y.stream) == ((2, 1, 1), (32, 1, 1), 77)
    assert [int.from_bytes(bytes.fromhex(p), "little") for p in with_y.parameters] == [
        x.data_ptr(),
        y.data_ptr(),
        0x3FC00000,
        5,
        0,
        0,
    ]
    assert int.from_bytes(bytes.fromhex(without.parameters[2]), "little") == 7
    assert library.counters.jit_compiles_total == 2


def test_each_kind_of_arguments_has_code_of_its_own_and_is_loaded_once(
    library: KernelLibrary, cuda_stub: StubGpu
) -> None:
    kernels = device(library, cuda_stub, "sm_90")
    x = torch.zeros(256)
    kinds = (
        x,
        x[1:],  # not aligned
        x.half(),
    )
    for _ in range(3):
        for size in (1, 16, 17, 1000):  # numbers make no other code
            for kind in kinds:
                fill(kernels, kind, None, size)
    assert library.counters.jit_compiles_total == 3
    assert len(cuda_stub.calls("load")) == 3
    assert len(cuda_stub.launches()) == 36
    fill(kernels, x, None, 1 << 40)  # but for one of 64 bits
    assert library.counters.jit_compiles_total == 4
    variant = Variant(_fill_kernel, CONFIG)
    kernels.start(variant, (1,), (x, None, 1.0, 64))
    with pytest.raises(KernelError, match=r"argument 2 of kernel _fill_kernel cannot be 1099511627776"):
        kernels.start(variant, (1,), (x, None, 1.0, 1 << 40))


def test_a_number_that_triton_specialises_on_is_an_error_of_ours(
    library: KernelLibrary, cuda_stub: StubGpu
) -> None:
    kernels = device(library, cuda_stub, "sm_90")
    with pytest.raises(AssertionError, match="_careless_kernel has a number that Triton specialises on"):
        kernels.launch(_careless_kernel, (1, 1, 1), (torch.zeros(64), 1), CONFIG, {"BLOCK": 64})


def test_tensors_beyond_32_bits_are_told_apart_on_amd_only(
    library: KernelLibrary, hip_stub: StubGpu, cuda_stub: StubGpu
) -> None:
    long = torch.empty(1 << 29)[:64]  # of 2 GiB, none of which is touched
    for target, stub, compiles in (("gfx942", hip_stub, 2), ("sm_90", cuda_stub, 3)):
        kernels = device(library, stub, target)
        fill(kernels, torch.zeros(64), None)
        fill(kernels, long, None)
        assert library.counters.jit_compiles_total == compiles


def test_a_variant_and_a_launch_lead_to_the_same_code(library: KernelLibrary, cuda_stub: StubGpu) -> None:
    kernels = device(library, cuda_stub, "sm_90")
    x = torch.zeros(64)
    variant = Variant(_fill_kernel, CONFIG)
    kernels.start(variant, (1,), (x, None, 2.0, 3))
    fill(kernels, x, None)
    kernels.start(variant, (1,), (x[1:], None, 2.0, 3))
    assert library.counters.jit_compiles_total == 2
    assert len(cuda_stub.calls("load")) == 2


def test_what_was_preloaded_is_not_looked_for_again(library: KernelLibrary, cuda_stub: StubGpu) -> None:
    wanted: list[Launch] = []
    with intercepting(TARGETS["sm_90"], wanted.append):
        rms_norm(torch.zeros(2, 64), torch.zeros(64), 1e-5)
    specialisation = wanted[0].specialise(TARGETS["sm_90"])
    assert device(library, cuda_stub, "sm_90").preload([specialisation]) == [specialisation]
    library.find(specialisation)
    kernels = device(library, cuda_stub, "sm_90")
    assert kernels.preload([specialisation]) == []
    hits = library.counters.kernel_cache_hits_total
    one = wanted[0]
    kernels.launch(one.kernel, one.grid, one.args, one.config, one.constants)
    assert library.counters.kernel_cache_hits_total == hits
    assert len(cuda_stub.launches()) == 1


def test_launchers_find_the_library_in_use(
    library: KernelLibrary, cuda_stub: StubGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with tensors that say that they are on one."""

    class OnGpu(torch.Tensor):
        is_cuda = True
        device = torch.device("cuda", 0)

    library.devices[0] = device(library, cuda_stub, "sm_90")
    monkeypatch.setattr(launch_module, "target_of_device", lambda device: TARGETS["sm_90"])
    x = torch.zeros(64).as_subclass(OnGpu)
    assert current_library() is not library
    with using(library):
        assert current_library() is library
        launch(_fill_kernel, (1,), x, None, 1.0, 64, config=CONFIG)
        Variant(_fill_kernel, CONFIG).start((1,), x, None, 1.0, 64)
        launch(_fill_kernel, (0,), x, None, 1.0, 64, config=CONFIG)
    assert len(cuda_stub.launches()) == 2
    assert library.counters.jit_compiles_total == 1


@triton.jit(do_not_specialize=["rows"])
def _described_kernel(x_ptr, y_ptr, rows, SIZE: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [rows, SIZE], [SIZE, 1], [16, SIZE])
    y = tl.make_tensor_descriptor(y_ptr, [rows, SIZE], [SIZE, 1], [16, SIZE])
    at = tl.program_id(0) * 16
    y.store([at, 0], x.load([at, 0]) * 2)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_descriptors_made_on_the_device_have_memory_there(
    target: str, library: KernelLibrary, cuda_stub: StubGpu, hip_stub: StubGpu
) -> None:
    stub = cuda_stub if target == "sm_90" else hip_stub
    asked: list[torch.Tensor] = []

    def allocate(num_bytes: int) -> torch.Tensor:
        asked.append(torch.empty(num_bytes, dtype=torch.uint8))
        return asked[-1]

    config = KernelConfig({}, num_warps=4, num_stages=2)
    x, y = torch.zeros(2, 64, 64, dtype=torch.bfloat16)
    stub.tell_parameters("_described_kernel", [8, 8, 4, 8, 8])
    for _ in range(2):  # the second takes the code, and what it asks for, from the cache
        kernels = device(library, stub, target, allocate)
        kernels.launch(_described_kernel, (4,), (x, y, 64), config, {"SIZE": 64})
    assert library.counters.jit_compiles_total == 1
    (entry,) = library.store.entries()
    pointers = [int.from_bytes(bytes.fromhex(one.parameters[3]), "little") for one in stub.launches()]
    if target == "sm_90":  # two descriptors of 128 bytes
        assert (entry.scratch_bytes, entry.scratch_align) == (256, 128)
        assert all(
            memory.data_ptr() <= pointer <= memory.data_ptr() + memory.numel() - 4 * 256
            for memory, pointer in zip(asked, pointers, strict=True)
        )
        assert [pointer % 128 for pointer in pointers] == [0, 0]
    else:  # plain pointers there
        assert (entry.scratch_bytes, asked, pointers) == (0, [], [0, 0])
