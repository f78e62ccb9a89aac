"""Targets, tables of tuned configs, and the three ways to launch a kernel."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from halimede.errors import KernelError
from halimede.kernels.compile import compile_case
from halimede.kernels.launch import INTERPRETED_TARGET, intercepting, launch, target_of
from halimede.kernels.spec import Case, KernelSpec, Tensors, all_kernels
from halimede.kernels.target import TARGETS, find_target, nearest_target, num_processors
from halimede.kernels.tuning import KernelConfig, next_power_of_2, pick_config, read_table, tuned_table

META, CPU = torch.device("meta"), torch.device("cpu")
CONFIG = KernelConfig({"BLOCK": 16}, num_warps=1, num_stages=1)


@triton.jit(do_not_specialize=["size"])
def _scale_kernel(x_ptr, y_ptr, factor: tl.float32, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < size)
    tl.store(y_ptr + offsets, x * factor, mask=offsets < size)


@triton.jit
def _double(x):
    return x + x


@triton.jit
def _arithmetic_kernel(x_ptr, w_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    w = tl.load(w_ptr + offsets)
    tl.store(y_ptr + offsets, _double(x * w) - w)


@triton.jit
def _until_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    size = tl.load(x_ptr)
    total = tl.zeros((BLOCK,), tl.int32)
    for i in range(size):
        if tl.load(x_ptr + 1 + i) > 0:
            total += 1
    tl.store(y_ptr + tl.arange(0, BLOCK), total)


@triton.jit
def _product_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, x))


def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
    y = torch.empty_like(x)
    launch(_scale_kernel, (-(-x.numel() // 16),), x, y, factor, x.numel(), config=CONFIG)
    return y


def _spec(launcher: Any, make: Any) -> KernelSpec:
    return KernelSpec("scale", "", launcher, launcher, "norm", (), (Case("one", make),), ())


# --- targets


def test_every_name_finds_its_target() -> None:
    for name, target in TARGETS.items():
        assert find_target(name) is target
        assert target.name == name
        assert target.for_triton().arch == target.arch
        assert nearest_target(target.backend, target.arch) is target
    with pytest.raises(KernelError, match="no kernels for cuda GPUs of type 75; they exist for: sm_80,"):
        find_target("sm_75")
    with pytest.raises(KernelError, match="'h100' is unknown; use one of: sm_80,"):
        find_target("h100")


def test_a_relative_gets_code_of_its_own() -> None:
    ultra, phoenix = find_target("sm_103"), find_target("gfx1103")
    assert (ultra.name, ultra.machine, ultra.arch) == ("sm_100", "sm_103", 100)
    assert (ultra.for_triton().arch, phoenix.for_triton().arch) == (103, "gfx1103")
    assert phoenix.name == "gfx1100"


@pytest.mark.parametrize(
    ("backend", "arch", "name"),
    [
        ("cuda", 87, "sm_86"),
        ("cuda", 103, "sm_100"),
        ("cuda", 121, "sm_120"),
        ("hip", "gfx941", "gfx942"),
        ("hip", "gfx1102", "gfx1100"),
        ("hip", "gfx1200", "gfx1201"),
    ],
)
def test_a_relative_runs_the_nearest_choices(backend: str, arch: int | str, name: str) -> None:
    assert nearest_target(backend, arch).name == name


@pytest.mark.parametrize(
    ("backend", "arch"), [("cuda", 75), ("hip", "gfx906"), ("hip", "gfx1030"), ("xpu", 1)]
)
def test_a_gpu_that_is_too_old_or_unknown_is_told(backend: str, arch: int | str) -> None:
    with pytest.raises(KernelError, match=f"no kernels for {backend} GPUs of type {arch}"):
        nearest_target(backend, arch)


def test_without_a_gpu_there_are_four_processors() -> None:
    assert num_processors(CPU) == num_processors(META) == 4


# --- configs and tables


def test_options_of_another_backend_are_left_out() -> None:
    config = KernelConfig({}, 8, 3, {"maxnreg": 128, "waves_per_eu": 2, "num_ctas": 1})
    common = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True, "num_ctas": 1}
    assert config.triton_options(TARGETS["sm_90"]) == common | {"maxnreg": 128}
    assert config.triton_options(TARGETS["gfx942"]) == common | {"waves_per_eu": 2}


def _entry(size: int) -> dict[str, Any]:
    return {"blocks": {"BLOCK": size}, "num_warps": 4, "num_stages": 2}


def _write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_the_nearest_bucket_above_is_taken_or_the_largest(tmp_path: Path) -> None:
    buckets = {"64": _entry(64), "16": _entry(16), "1024": _entry(1024)}
    table = read_table(_write(tmp_path / "sm_90.json", {"scale": {"bfloat16,128": buckets}}))

    def block(size: int, key: str = "bfloat16,128", kernel: str = "scale") -> int:
        picked = pick_config(kernel, TARGETS["sm_90"], key, size, lambda: CONFIG, table=table)
        return picked.blocks["BLOCK"]

    assert [block(size) for size in (1, 16, 17, 64, 65, 9999)] == [16, 16, 64, 64, 1024, 1024]
    assert block(64, key="float16,128") == block(64, kernel="other") == CONFIG.blocks["BLOCK"]


def test_a_table_keeps_the_options(tmp_path: Path) -> None:
    entry = _entry(32) | {"options": {"waves_per_eu": 2}}
    table = read_table(_write(tmp_path / "gfx942.json", {"k": {"x": {"1": entry}}}))
    assert table["k"]["x"][0] == (1, KernelConfig({"BLOCK": 32}, 4, 2, {"waves_per_eu": 2}))


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"k": []},
        {"k": {"x": {"many": _entry(1)}}},
        {"k": {"x": {"1": {"blocks": {}}}}},
        {"k": {"x": {"1": _entry(1) | {"warps": 4}}}},
        {"k": {"x": {"1": _entry(1) | {"num_warps": None}}}},
    ],
)
def test_a_damaged_table_is_named(content: Any, tmp_path: Path) -> None:
    path = _write(tmp_path / "sm_90.json", content)
    with pytest.raises(KernelError, match=r"sm_90\.json is not a table of tuned kernels .* delete it"):
        read_table(path)


def test_what_ships_can_be_read() -> None:
    for target in TARGETS:
        assert tuned_table(target).keys() <= all_kernels().keys()


def test_next_power_of_2() -> None:
    assert [next_power_of_2(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]


# --- launching


def test_on_cpu_tensors_a_kernel_is_interpreted() -> None:
    x = torch.randn(37)
    assert torch.equal(scale(x, 3.0), x * 3)
    assert scale(torch.empty(0), 3.0).shape == (0,)
    assert target_of(x) is INTERPRETED_TARGET


def test_meta_tensors_need_a_compiler_around() -> None:
    with pytest.raises(KernelError, match="tensors on meta, where no kernel runs"):
        scale(torch.empty(16, device=META), 2.0)


def test_compiling_collects_each_launch_for_its_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    seen = []

    def twice(x: torch.Tensor) -> Tensors:
        seen.append(target_of(x).name)
        return scale(x, 2.0), scale(x[:0], 2.0)

    spec = _spec(twice, lambda device: {"x": torch.zeros(64, device=device)})
    for name, text in (("sm_80", "ptx"), ("gfx1100", "amdgcn")):
        builds = compile_case(spec, spec.signatures[0], TARGETS[name])
        assert [build.name for build in builds] == ["_scale_kernel"] * 2
        assert text in builds[0].compiled.asm
        assert builds[0].config is CONFIG
    assert seen == ["sm_80", "gfx1100"]
    # What was compiled is interpreted all the same.
    assert torch.equal(scale(torch.ones(5), 2.0), torch.full((5,), 2.0))


def test_what_cannot_be_compiled_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def wrong(x: torch.Tensor) -> Tensors:
        launch(_scale_kernel, (1,), x, x, 1.0, 1, config=KernelConfig({"BLOCK": 17}))
        return ()

    spec = _spec(wrong, lambda device: {"x": torch.zeros(64, device=device)})
    active = triton.runtime.driver._active
    with pytest.raises(KernelError, match=r"(?s)scale \(one\) cannot be compiled for sm_90 by .*power of 2"):
        compile_case(spec, spec.signatures[0], TARGETS["sm_90"])
    assert triton.runtime.driver._active is active


def test_a_launchers_own_error_is_passed_on() -> None:
    def refuses(x: torch.Tensor) -> Tensors:
        raise KernelError("too wide")

    spec = _spec(refuses, lambda device: {"x": torch.zeros(1, device=device)})
    with pytest.raises(KernelError, match=r"^too wide$"):
        compile_case(spec, spec.signatures[0], TARGETS["sm_90"])


def test_intercepting_ends_with_an_error() -> None:
    with pytest.raises(ValueError, match="stop"), intercepting(TARGETS["sm_80"], lambda launch: None):
        assert target_of(torch.empty(0)) is TARGETS["sm_80"]
        raise ValueError("stop")
    assert target_of(torch.empty(0, device=META)) is INTERPRETED_TARGET


# --- the interpreter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_rounds_as_torch_does(dtype: torch.dtype) -> None:
    x, w = torch.randn(2, 256).to(dtype)
    y = torch.empty_like(x)
    launch(_arithmetic_kernel, (1,), x, w, y, config=KernelConfig({"BLOCK": 256}))
    product = x * w
    assert torch.equal(y, (product + product) - w)


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16])
def test_stores_round_to_nearest_even(target: torch.dtype) -> None:
    x = torch.cat((torch.randn(60), torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, float("inf"), -0.0])))
    y = torch.empty(64, dtype=target)
    launch(_scale_kernel, (4,), x, y, 1.0, 64, config=CONFIG)
    assert torch.equal(y, x.to(target))


@triton.jit
def _cast_kernel(x_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    y = tl.load(x_ptr + at).to(tl.bfloat16)
    tl.store(y_ptr + at, y)
    tl.store(z_ptr + at, y.to(tl.int32))


def test_integers_become_bfloat16_by_value() -> None:
    x = torch.tensor([0, 1, -3, 100, 257, 1 << 20, -128, 7], dtype=torch.int32)
    y, z = torch.empty(8, dtype=torch.bfloat16), torch.empty(8, dtype=torch.int32)
    launch(_cast_kernel, (1,), x, y, z, config=KernelConfig({"BLOCK": 8}))
    assert torch.equal(y, x.bfloat16())
    assert torch.equal(z, x.bfloat16().int())


def test_products_of_bfloat16_are_right() -> None:
    x = torch.randn(16, 16).bfloat16()
    y = torch.empty(16, 16)
    launch(_product_kernel, (1,), x, y, config=KernelConfig({"SIZE": 16}))
    torch.testing.assert_close(y, (x.double() @ x.double()).float(), rtol=1e-6, atol=1e-5)


def test_loops_and_branches_follow_loaded_scalars() -> None:
    x = torch.tensor([4, 1, 0, 5, -2, 9], dtype=torch.int32)
    y = torch.empty(2, dtype=torch.int32)
    launch(_until_kernel, (1,), x, y, config=KernelConfig({"BLOCK": 2}))
    assert y.tolist() == [2, 2]


def test_the_language_is_left_as_it_was() -> None:
    before = {name: getattr(tl, name) for name in ("load", "arange", "program_id", "dot")}
    scale(torch.ones(3), 2.0)
    assert all(getattr(tl, name) is value for name, value in before.items())
    assert not triton.knobs.runtime.interpret
    with pytest.raises(Exception, match=r"Cannot call @triton\.jit"):
        _double(1)


# --- discovery


def test_specs_are_whole() -> None:
    for spec in all_kernels().values():
        assert len({case.name for case in spec.cases}) == len(spec.cases) > 0, spec.name
        assert len({case.name for case in spec.signatures}) == len(spec.signatures) > 0, spec.name
        assert not [case.name for case in spec.signatures if "|" in case.name or " at 0x" in case.name]
        assert spec.summary, spec.name


def test_a_gpu_is_named_by_what_torch_says_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from halimede.kernels.target import target_of_device

    properties = SimpleNamespace(
        major=9, minor=0, gcnArchName="gfx942:sramecc+:xnack-", multi_processor_count=78
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gpu = torch.device("cuda", 7)
    assert target_of_device(gpu).name == "sm_90"
    assert num_processors(gpu) == 78
    target_of_device.cache_clear()
    num_processors.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert target_of_device(gpu).name == "gfx942"
    target_of_device.cache_clear()
