"""Launch plans on GPU drivers that only pretend: what the driver is given is what the caller gave."""

import math
import random
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from stub_gpu import Backend, Gpu, parameter_sizes, real_driver, sample_kernels

from halimede.errors import KernelError
from halimede.kernels import gpu_driver, launch_plan
from halimede.kernels.launch_plan import LaunchPlan, launch_on

SIZES = {"i1": 1, "u1": 1, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "i32": 4, "u32": 4, "fp32": 4}
STREAM = 0x7FFF_1234_5678

_VALUES: dict[str, tuple[Any, ...]] = {
    "*bf16": (0, 16, 0x7F12_3456_7890, (1 << 64) - 16),
    "i1": (True, False, 1, 0),
    "u1": (True, False, 1, 0),
    "i8": (0, 127, -1, -128),
    "u8": (0, 255),
    "i16": (0, -1, -(1 << 15), (1 << 15) - 1),
    "u16": (0, (1 << 16) - 1),
    "i32": (0, -1, -(1 << 31), (1 << 31) - 1, 16),
    "u32": (0, (1 << 31), (1 << 32) - 1),
    "i64": (0, -1, -(1 << 63), (1 << 63) - 1),
    "u64": (0, 1 << 63, (1 << 64) - 1),
    "fp32": (0.0, -0.0, 0.1, -1.5, 3, math.inf, -math.inf, math.nan, 1e-45),
    "fp64": (0.0, -0.0, 0.1, 1e308, -3, math.inf, math.nan, 5e-324),
}
_NANS = {"fp32": "0000c07f", "fp64": "000000000000f87f"}
TYPES = list(_VALUES)


def _size(kind: str) -> int:
    return SIZES.get(kind, 8)


def _bytes(kind: str, value: Any) -> str:
    """The value as the GPU reads it, in hexadecimal digits."""
    if kind.startswith("fp"):
        return np.array(value, np.float32 if kind == "fp32" else np.float64).tobytes().hex()
    signed = kind.startswith("i") and kind != "i1"
    return int(value).to_bytes(_size(kind), "little", signed=signed).hex()


def _plan(gpu: Gpu, types: Sequence[str], *, device: int = 0, shared: int = 0, warps: int = 4) -> LaunchPlan:
    gpu.stub.tell_parameters(gpu.entry_point, [*map(_size, types), 8, 8])
    function = gpu.driver.load(gpu.binary, gpu.entry_point, shared, device)
    threads = warps * gpu.warp_size
    return LaunchPlan(
        gpu.driver, function, name=gpu.entry_point, types=types, threads=threads, shared_memory=shared
    )


def _expected(types: Sequence[str], values: Sequence[Any]) -> tuple[str, ...]:
    return (*(_bytes(k, v) for k, v in zip(types, values, strict=True)), "00" * 8, "00" * 8)


@pytest.mark.parametrize("target", sample_kernels.TARGETS)
def test_kernels_take_their_arguments_and_two_pointers(target: str, sample_codes: dict[str, Any]) -> None:
    types = list(sample_kernels.TYPES.values())
    assert parameter_sizes(sample_codes[target]) == [*map(_size, types), 8, 8]


@pytest.mark.parametrize("kind", TYPES)
def test_every_value_arrives_bit_for_bit(gpu: Gpu, kind: str) -> None:
    plan = _plan(gpu, [kind])
    for value in _VALUES[kind]:
        plan((1,), 0, [value])
    arrived = [launch.parameters[0] for launch in gpu.stub.launches()]
    assert arrived == [_bytes(kind, value) for value in _VALUES[kind]]
    if kind in _NANS:
        assert _NANS[kind] in arrived


def test_floats_beyond_fp32_become_infinite_as_in_c(gpu: Gpu) -> None:
    _plan(gpu, ["fp32"])((1,), 0, [-1e300])
    assert gpu.stub.launches()[0].parameters[0] == "000080ff"


def test_every_mix_of_alignments_arrives(gpu: Gpu) -> None:
    generator = random.Random(0)
    expected = []
    for _ in range(60):
        types = generator.choices(TYPES, k=generator.randrange(0, 24))
        values = [generator.choice(_VALUES[kind]) for kind in types]
        _plan(gpu, types)((1,), 0, values)
        expected.append(_expected(types, values))
    assert [launch.parameters for launch in gpu.stub.launches()] == expected


def test_launch_has_everything(gpu: Gpu) -> None:
    plan = _plan(gpu, ["*i32", "i64"], shared=60_000, warps=8)
    plan((5, 6, 7), STREAM, (0x1000, -2))
    plan.launch((5, 6, 7), STREAM, (0x1000, -2))
    launch, same = gpu.stub.launches()
    assert launch == same
    assert (launch.grid, launch.block, launch.shared) == ((5, 6, 7), (8 * gpu.warp_size, 1, 1), 60_000)
    assert (launch.stream, launch.function, launch.device) == (STREAM, "every_type", 0)
    assert launch.parameters == _expected(["*i32", "i64"], (0x1000, -2))


def test_grids_of_one_to_three_sizes(gpu: Gpu) -> None:
    plan = _plan(gpu, [])
    for grid in [(3,), (3, 4), (3, 4, 5)]:
        plan(grid, 0, ())
    assert [launch.grid for launch in gpu.stub.launches()] == [(3, 1, 1), (3, 4, 1), (3, 4, 5)]


def test_size_of_zero_starts_nothing(gpu: Gpu) -> None:
    plan = _plan(gpu, [])
    for grid in [(0,), (3, 0), (3, 4, 0), (0, 4, 5)]:
        plan(grid, 0, ())
    assert gpu.stub.launches() == []


@pytest.mark.parametrize("grid", [(), (1, 2, 3, 4), (-1,), (1, -2), (1, 1, 1 << 31), (1 << 32, 1, 1)])
def test_grids_that_cannot_be_are_refused(gpu: Gpu, grid: tuple[int, ...]) -> None:
    with pytest.raises(KernelError, match=r"kernel every_type was given the grid .*size"):
        _plan(gpu, [])(grid, 0, ())
    assert gpu.stub.launches() == []


def test_refusal_of_the_driver_names_kernel_and_sizes(gpu: Gpu) -> None:
    plan = _plan(gpu, [])
    # 2**31 - 1 blocks of 256 threads are too many for HIP, more than 65535 in y for CUDA.
    with pytest.raises(KernelError) as caught:
        plan((1, 70_000, 1) if gpu.backend == "cuda" else ((1 << 31) - 1, 1, 1), 0, ())
    for part in ("launching kernel every_type over (", f"{4 * gpu.warp_size} threads", "INVALID"):
        assert part.lower() in str(caught.value).lower()
    with gpu.stub.set(fail=f"{gpu.launch_call}:700"), pytest.raises(KernelError, match="restart"):
        plan((1,), 0, ())
    plan((1,), 0, ())
    assert len(gpu.stub.launches()) == 1


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("*bf16", None),
        ("*bf16", 1 << 64),
        ("*bf16", 1.0),
        ("i8", 128),
        ("u8", -1),
        ("i16", 1 << 15),
        ("i32", 1 << 31),
        ("i32", 1.0),
        ("u32", -1),
        ("i64", 1 << 63),
        ("u64", -1),
        ("u64", 1 << 64),
        ("fp32", "1"),
        ("fp64", None),
    ],
)
def test_value_that_does_not_fit_is_named(gpu: Gpu, kind: str, value: Any) -> None:
    types = ["i32", kind, "fp32"]
    plan = _plan(gpu, types)
    with pytest.raises(KernelError) as caught:
        plan((1,), 0, [1, value, 0.5])
    assert f"argument 1 of kernel every_type cannot be {value!r}: it is a {kind};" in str(caught.value)
    assert gpu.stub.launches() == []
    plan((1,), 0, [1, 2, 0.5])
    assert gpu.stub.launches()[0].parameters == _expected(types, [1, 2, 0.5])


@pytest.mark.parametrize("values", [(), (1,), (1, 2, 3)])
def test_wrong_number_of_values_is_told(gpu: Gpu, values: tuple[int, ...]) -> None:
    with pytest.raises(KernelError, match=rf"takes 2 arguments \(i32, i64\), not {len(values)}"):
        _plan(gpu, ["i32", "i64"])((1,), 0, values)


@pytest.mark.parametrize(
    "kind", ["fp16", "bf16", "tensordesc<bf16[16, 64]>", "constexpr", "nvTmaDesc", ("i32", "*i8")]
)
def test_types_without_a_plain_value_are_refused(gpu: Gpu, kind: Any) -> None:
    with pytest.raises(KernelError) as caught:
        _plan(gpu, ["i32", kind])
    assert f"argument 1 of kernel every_type is a {kind}, which cannot be passed" in str(caught.value)


def test_arguments_of_threads_do_not_mix(gpu: Gpu) -> None:
    types = [*["*bf16"] * 4, *["i32"] * 6, "i64", "fp64"]
    plan = _plan(gpu, types)
    num_threads, num_launches = 8, 100
    together = Barrier(num_threads)

    def values_of(thread: int, turn: int) -> list[int]:
        return [1000 * thread + turn] * len(types)

    def work(thread: int) -> None:
        together.wait()
        for turn in range(num_launches):
            plan((1 + thread, 1 + turn), 0x1000 + thread, values_of(thread, turn))

    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(work, range(num_threads)))
    launches = gpu.stub.launches()
    assert len(launches) == num_threads * num_launches
    for launch in launches:
        thread, turn = launch.grid[0] - 1, launch.grid[1] - 1
        assert launch.stream == 0x1000 + thread
        assert launch.parameters == _expected(types, values_of(thread, turn))
    assert len({launch.grid for launch in launches}) == len(launches)


def _scratch_plan(
    gpu: Gpu, types: Sequence[str], size: int, align: int, asked: list[torch.Tensor]
) -> LaunchPlan:
    gpu.stub.tell_parameters(gpu.entry_point, [*map(_size, types), 8, 8])

    def allocate(num_bytes: int) -> torch.Tensor:
        asked.append(torch.empty(num_bytes + 8, dtype=torch.uint8)[8:])  # of an address that is not aligned
        return asked[-1]

    function = gpu.driver.load(gpu.binary, gpu.entry_point, 0, 0)
    return LaunchPlan(
        gpu.driver,
        function,
        name=gpu.entry_point,
        types=types,
        threads=gpu.warp_size,
        shared_memory=0,
        scratch_bytes=size,
        scratch_align=align,
        allocate=allocate,
    )


@pytest.mark.parametrize("types", [[], ["*bf16"], ["i8"], ["*bf16", "i32", "i8"]])
def test_kernel_that_wants_scratch_memory_is_given_it(gpu: Gpu, types: list[str]) -> None:
    asked: list[torch.Tensor] = []
    plan = _scratch_plan(gpu, types, 384, 128, asked)
    values = [3] * len(types)
    for grid in [(5,), (5, 7, 2)]:
        plan(grid, 0, values)
    for launch, memory, blocks in zip(gpu.stub.launches(), asked, (5, 70), strict=True):
        *arguments, scratch, profile = launch.parameters
        assert (*arguments, "00" * 8, profile) == _expected(types, values)
        address = int.from_bytes(bytes.fromhex(scratch), "little")
        assert address % 128 == 0
        assert memory.data_ptr() <= address
        assert address + blocks * 384 <= memory.data_ptr() + memory.numel()


def test_launch_that_starts_nothing_asks_for_no_scratch_memory(gpu: Gpu) -> None:
    asked: list[torch.Tensor] = []
    plan = _scratch_plan(gpu, [], 128, 128, asked)
    plan((0, 4), 0, ())
    with pytest.raises(KernelError, match=r"was given the grid \(-1, 4\)"):
        plan((-1, 4), 0, ())
    assert (asked, gpu.stub.launches()) == ([], [])


def test_scratch_pointer_is_not_told_of_as_an_argument(gpu: Gpu) -> None:
    plan = _scratch_plan(gpu, ["i32"], 128, 128, [])
    with pytest.raises(KernelError, match=r"takes 1 arguments \(i32\), not 2"):
        plan((1,), 0, (1, 2))
    with pytest.raises(KernelError, match="argument 0 of kernel every_type cannot be 'a': it is a i32"):
        plan((1,), 0, ("a",))


def test_thread_that_never_used_the_gpu_launches(gpu: Gpu) -> None:
    device = 1 if gpu.backend == "cuda" else 0
    plan = _plan(gpu, ["i32"], device=device)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(plan, (1,), 0, [5]).result()
    assert [launch.device for launch in gpu.stub.launches()] == [device]


@pytest.mark.parametrize("gpu", ["cuda"], indirect=True)
def test_thread_that_cannot_be_prepared_is_told(gpu: Gpu) -> None:
    plan = _plan(gpu, ["i32"])
    with (
        ThreadPoolExecutor(1) as threads,
        gpu.stub.set(fail="cuCtxSetCurrent:1"),
        pytest.raises(KernelError, match="preparing a thread"),
    ):
        threads.submit(plan, (1,), 0, [5]).result()


def test_launch_on_another_device_than_the_current_is_refused(gpu: Gpu) -> None:
    _plan(gpu, ["i32"], device=0)
    plan = _plan(gpu, ["i32"], device=1)

    def launch() -> None:
        if gpu.backend == "cuda":
            gpu.driver.load(gpu.binary, gpu.entry_point, 0, 0)
        plan((1,), 0, [5])

    with ThreadPoolExecutor(1) as threads, pytest.raises(KernelError, match="current device is not the one"):
        threads.submit(launch).result()


def test_launch_on_switches_only_to_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    @contextmanager
    def switched(device: int) -> Any:
        done.append(("to", device))
        yield
        done.append("back")

    monkeypatch.setattr(gpu_driver, "_raw_stream", lambda device: 100 + device)
    monkeypatch.setattr(launch_plan, "_current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", switched)
    launch_on(1, lambda *arguments: done.append(arguments), (1,), [2])
    launch_on(0, lambda *arguments: done.append(arguments), (1,), [2])
    assert done == [((1,), 101, [2]), ("to", 0), ((1,), 100, [2]), "back"]


@pytest.mark.parametrize("backend", ["cuda", "hip"])
def test_driver_of_triton_passes_the_same(
    backend: Backend, stub_libraries: dict[Backend, Path], tmp_path: Path
) -> None:
    library = stub_libraries[backend]
    (tmp_path / library.name).write_bytes(library.read_bytes())
    done = subprocess.run(
        [sys.executable, real_driver.__file__, backend, tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("every_type") == 2
    assert done.stdout.count("product") == 1
    assert done.stdout.count("described") == 1
