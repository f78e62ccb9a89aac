"""Triton's own driver on a driver that only pretends, and what it passes beside what halimede's passes.

python real_driver.py cuda FOLDER     # FOLDER: of the built stub; also for the log and Triton's cache
"""

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import triton

sys.path.insert(0, str(Path(__file__).parents[1]))

from stub_gpu import Backend, StubGpu, parameter_sizes
from stub_gpu.sample_kernels import described, every_type, product

STREAM = 0x7FFF_1234_5678


def use_real_driver(backend: Backend, library: Path) -> Any:
    """Make Triton launch through its real driver on the stub; it needs a C compiler. Torch is on the CPU."""
    ctypes.CDLL(str(library))  # Triton's module then finds it by its name
    if backend == "cuda":
        os.environ["TRITON_LIBCUDA_PATH"] = str(library.parent)
        from triton.backends.nvidia.driver import CudaDriver as Driver
    else:
        os.environ["TRITON_LIBHIP_PATH"] = str(library)
        from triton.backends.amd.driver import HIPDriver as Driver
    driver = Driver()
    # What it asks torch, which has no GPU here.
    driver.get_device_capability = lambda device=None: (9, 0)
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: STREAM
    triton.runtime.driver.set_active(driver)
    return driver


class _Memory:
    """An allocator that always gives the same, and knows for how many bytes it was asked."""

    def __init__(self) -> None:
        import torch

        memory = torch.zeros(1 << 20, dtype=torch.uint8)
        self._memory = memory[-memory.data_ptr() % 1024 :]
        self.asked: list[int] = []

    def allocate(self, num_bytes: int, align: int, stream: Any) -> Any:
        self.asked.append(num_bytes)
        return self._memory


def _compare(
    stub: StubGpu, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], **options: Any
) -> None:
    import torch

    from halimede.kernels.gpu_driver import cuda_driver, hip_driver
    from halimede.kernels.launch_plan import LaunchPlan

    memory = _Memory()
    triton.set_allocator(memory.allocate)
    compiled = kernel.warmup(*args, grid=grid, **options)
    sizes = parameter_sizes(compiled)
    stub.tell_parameters(compiled.name, sizes)
    kernel[grid](*args, **options)

    make = hip_driver if compiled.metadata.target.backend == "hip" else cuda_driver
    driver = make(str(stub.library))
    shared = compiled.metadata.shared
    function = driver.load(compiled.kernel, compiled.name, shared, 0)
    types = [kind for kind in compiled.src.signature.values() if kind != "constexpr"]
    assert len(types) == len(args) == len(sizes) - 2, (types, args, sizes)
    threads = compiled.metadata.num_warps * compiled.metadata.target.warp_size
    plan = LaunchPlan(
        driver,
        function,
        name=compiled.name,
        types=types,
        threads=threads,
        shared_memory=shared,
        scratch_bytes=getattr(compiled.metadata, "global_scratch_size", 0) or 0,
        scratch_align=getattr(compiled.metadata, "global_scratch_align", 1) or 1,
        allocate=lambda num_bytes: memory.allocate(num_bytes, 1, None),
    )
    values = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
    plan(grid, STREAM, values)

    theirs, ours = stub.launches()[-2:]
    assert theirs == ours, f"Triton: {theirs}\nours:   {ours}"
    assert len(ours.parameters) == len(sizes)
    assert ours.shared == shared
    if memory.asked:  # ours allows for an address that is not aligned
        of_triton, of_ours = memory.asked
        assert of_triton <= of_ours < of_triton + 1024, memory.asked
    scratch = int.from_bytes(bytes.fromhex(ours.parameters[-2]), "little")
    assert bool(scratch) == bool(memory.asked)
    print(f"{ours.function} {ours.grid} {ours.block} {ours.shared} {' '.join(types)} {ours.parameters}")


def main(backend: Backend, folder: Path) -> None:
    """Launch some kernels both ways; AssertionError where they differ."""
    import torch

    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    os.environ["STUB_GPU_LOG"] = str(folder / "log")
    library = folder / ("libcuda.so.1" if backend == "cuda" else "libamdhip64.so")
    use_real_driver(backend, library)
    stub = StubGpu(library, folder / "log")
    stub.reload()
    i8, bf16, i64 = (torch.zeros(64, dtype=d) for d in (torch.int8, torch.bfloat16, torch.int64))
    # Triton takes every int for an i32, i64 or u64, every float for an fp32 and every bool for a u1.
    numbers = (True, -1e300, -7, 0x7FFF, 0, -(1 << 31), False)
    more = (float("nan"), (1 << 64) - 1, 5, -(1 << 63), (1 << 16) - 1, (1 << 32) - 1)
    args = (i8, *numbers, bf16[1:], *more, i64, True)
    _compare(stub, every_type, (3, 2), args, BLOCK=64, enable_fp_fusion=True)
    _compare(stub, every_type, (1,), args, BLOCK=64, enable_fp_fusion=True, num_warps=8)
    a, b, c = (torch.zeros(128, 128, dtype=torch.bfloat16) for _ in range(3))
    size, stages = (128, 3) if backend == "cuda" else (64, 2)
    _compare(
        stub, product, (7, 1, 5), (a, b, c, 128, 0.1), SIZE=size, num_stages=stages, enable_fp_fusion=True
    )
    _compare(stub, described, (3, 2), (a, c, 128), SIZE=64, num_warps=4, enable_fp_fusion=True)
    if backend == "cuda":
        allowed = [call["bytes"] for call in stub.calls("allow_shared")]
        assert allowed == [227 << 10] * 2, allowed
        assert [call["config"] for call in stub.calls("cache_config")] == [1, 1]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))  # type: ignore[arg-type]
