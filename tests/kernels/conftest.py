"""GPU drivers that only pretend, built once in each process that runs tests."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stub_gpu import Backend, Gpu, StubGpu, build_stub, has_compiler, sample_kernels

from halimede.kernels.gpu_driver import cuda_driver, hip_driver


@pytest.fixture(scope="session")
def stub_libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[Backend, Path]:
    """The library of each backend's stub, each in a folder of its own."""
    if not has_compiler():
        pytest.skip("needs a C compiler (cc), to build a GPU driver that only pretends")
    return {
        "cuda": build_stub("cuda", tmp_path_factory.mktemp("stub_cuda")),
        "hip": build_stub("hip", tmp_path_factory.mktemp("stub_hip")),
    }


def _stub(library: Path, folder: Path) -> Iterator[StubGpu]:
    stub = StubGpu(library, folder / "launches")
    stub.forget_thread()
    with stub.set(log=str(stub.log)):
        yield stub


@pytest.fixture
def cuda_stub(stub_libraries: dict[Backend, Path], tmp_path: Path) -> Iterator[StubGpu]:
    """A pretended NVIDIA driver with a log of its own."""
    yield from _stub(stub_libraries["cuda"], tmp_path)


@pytest.fixture
def hip_stub(stub_libraries: dict[Backend, Path], tmp_path: Path) -> Iterator[StubGpu]:
    """A pretended AMD driver with a log of its own."""
    yield from _stub(stub_libraries["hip"], tmp_path)


@pytest.fixture(scope="session")
def sample_codes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """sample_kernels.every_type, compiled by Triton for each target of that file."""
    types = sample_kernels.TYPES
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        return {
            target: sample_kernels.compile_sample(sample_kernels.every_type, target, types, BLOCK=64)
            for target in sample_kernels.TARGETS
        }


@pytest.fixture(params=["cuda", "hip"])
def gpu(
    request: pytest.FixtureRequest,
    stub_libraries: dict[Backend, Path],
    tmp_path: Path,
    sample_codes: dict[str, Any],
) -> Iterator[Gpu]:
    """Each kind of GPU in turn."""
    backend: Backend = request.param
    code = sample_codes["sm_90" if backend == "cuda" else "gfx942"]
    for stub in _stub(stub_libraries[backend], tmp_path):
        make, call = (
            (cuda_driver, "cuLaunchKernel") if backend == "cuda" else (hip_driver, "hipModuleLaunchKernel")
        )
        driver = make(str(stub.library))
        binary = sample_kernels.machine_code(code)
        yield Gpu(backend, stub, driver, binary, code.name, call, code.metadata.target.warp_size)
