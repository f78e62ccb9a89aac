"""What is read from compiled kernels, held against NVIDIA's tools and against the gate's fast numbers."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from halimede.errors import KernelError
from halimede.kernels import inspect
from halimede.kernels.compile import compile_case, plan_case
from halimede.kernels.compiler import Build
from halimede.kernels.gate import measure
from halimede.kernels.inspect import inspect_build, sass
from halimede.kernels.kernel_source import kernel_source
from halimede.kernels.launch import launch
from halimede.kernels.machine_code_cubin import read_cubin
from halimede.kernels.source_tokens import source_tokens
from halimede.kernels.spec import Case, KernelSpec, Tensors, all_kernels
from halimede.kernels.target import TARGETS
from halimede.kernels.tuning import KernelConfig

CUDA = [name for name, target in TARGETS.items() if target.backend == "cuda"]


@triton.jit
def _product_kernel(x_ptr, y_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK)[:, None] * SIZE, tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, SIZE, BLOCK):
        x = tl.load(x_ptr + rows + start + columns)
        total = tl.dot(x, tl.trans(x), total)
    tl.store(y_ptr + rows + columns, total.to(tl.bfloat16))


def _product(x: torch.Tensor) -> Tensors:
    y = torch.empty_like(x)
    launch(_product_kernel, (1,), x, y, config=KernelConfig({"BLOCK": 64}), SIZE=x.shape[1])
    return (y,)


def _case(size: int) -> Case:
    return Case("product", lambda device: {"x": torch.zeros(64, size, dtype=torch.bfloat16, device=device)})


PRODUCT = KernelSpec("product", "", _product, _product, "matmul", (), (_case(512),), (), matrix_product=True)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def product(target: str) -> Build:
    (build,) = compile_case(PRODUCT, PRODUCT.signatures[0], TARGETS[target])
    return build


@pytest.mark.parametrize("target", CUDA)
def test_a_cubin_reads_as_the_tools_read_it(target: str, tmp_path: Path) -> None:
    build = product(target)
    path = tmp_path / "product.cubin"
    path.write_bytes(build.compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
    usage = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text.stdout)}
    cubin = read_cubin(build.compiled.asm["cubin"])
    assert (cubin.registers, cubin.stack_bytes, cubin.shared_bytes) == (
        usage["REG"],
        usage["STACK"],
        usage["SHARED"],
    )
    operations = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?(\w+)", sass(build))
    assert cubin.instructions == sum(name != "NOP" for name in operations)


@pytest.mark.parametrize("target", TARGETS)
def test_matrix_instructions_and_wide_loads_are_found(target: str) -> None:
    build = product(target)
    code, numbers = inspect_build(build), measure(build, TARGETS[target])
    kind = {"sm_90": "wgmma", "sm_100": "tcgen05", "gfx1100": "wmma", "gfx1201": "wmma"}.get(
        target, "mfma" if target.startswith("gfx") else "mma"
    )
    assert code.target == target
    assert code.mix[kind] == code.matrix_instructions > 0
    assert (numbers.registers, numbers.spill_bytes, numbers.shared_bytes, numbers.instructions) == (
        code.registers,
        code.spill_bytes,
        code.shared_bytes,
        code.instructions,
    )
    assert numbers.matrix > 0
    assert (numbers.group_matrix > 0) is (kind in ("wgmma", "tcgen05"))
    assert numbers.wide_percent == 100
    loads = code.mix["global_loads"] + code.mix["async_copies"]
    assert loads == code.mix["global_loads_128"] + code.mix["async_copies_128"] > 0
    assert code.spills == 0
    assert 0 < code.occupancy <= 1
    assert code.warps % code.num_warps == 0


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "num_warps", "resident"),
    [
        (90, 32, 0, 4, (64, 64)),
        (90, 255, 0, 4, (8, 64)),
        (90, 128, 0, 8, (16, 64)),
        (90, 32, 110 << 10, 4, (8, 64)),
        (86, 32, 0, 1, (16, 48)),
        (89, 40, 0, 4, (48, 48)),
        (120, 168, 48 << 10, 4, (8, 48)),
    ],
)
def test_occupancy_of_nvidia(
    arch: int, registers: int, shared: int, num_warps: int, resident: tuple[int, int]
) -> None:
    metadata = SimpleNamespace(target=SimpleNamespace(arch=arch), num_warps=num_warps, shared=shared)
    assert inspect._nvidia_warps(metadata, registers, 0) == resident


def test_occupancy_of_amd_is_bounded_by_lds() -> None:
    metadata = SimpleNamespace(target=SimpleNamespace(arch="gfx942"), num_warps=4, shared=0)
    assert inspect._amd_warps(metadata, "; Occupancy: 8\n") == (32, 32)
    metadata.shared = 40 << 10
    assert inspect._amd_warps(metadata, "; Occupancy: 8\n") == (4, 32)
    with pytest.raises(KernelError, match="does not say its occupancy"):
        inspect._amd_warps(metadata, "")


def test_a_missing_disassembler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    build = product("sm_90")
    monkeypatch.setattr(triton, "__file__", "/nowhere/triton/__init__.py")
    with pytest.raises(KernelError, match=r"nvdisasm cannot be run.*pip install"):
        inspect_build(build)


@pytest.mark.parametrize("damage", [b"", b"\x7fELF", "cut"])
def test_a_damaged_cubin_is_a_typed_error(damage: Any) -> None:
    whole = product("sm_80").compiled.asm["cubin"]
    with pytest.raises(KernelError, match="cannot be read"):
        read_cubin(whole[: len(whole) // 2] if damage == "cut" else damage)


def test_a_digest_follows_what_is_compiled() -> None:
    def digest(spec: KernelSpec, case: Case, target: str) -> str:
        (plan,) = plan_case(spec, case, TARGETS[target])
        return plan.digest

    base = digest(PRODUCT, _case(512), "sm_90")
    product("sm_90")  # what has been compiled is planned all the same
    assert digest(PRODUCT, _case(512), "sm_90") == base
    assert digest(PRODUCT, _case(256), "sm_90") != base
    assert digest(PRODUCT, _case(512), "sm_89") != base
    norm = all_kernels()["rms_norm"]
    plans = [plan_case(norm, case, TARGETS["sm_90"])[0] for case in norm.signatures]
    assert len({plan.digest for plan in plans}) == len(plans)


def test_a_source_is_read_without_its_layout() -> None:
    plain = "def f(x):\n    return x + 1\n"
    same = 'def f(x):\n    """What."""\n\n    # Why.\n    return x + 1  # so\n'
    assert source_tokens(plain) == source_tokens(same)
    assert source_tokens(plain) != source_tokens(plain.replace("1", "2"))
    assert source_tokens('def f(x):\n    return g("a")\n') != source_tokens('def f(x):\n    return g("b")\n')
    assert source_tokens("def f(x):\n    if x:\n        a()\n    b()\n") != source_tokens(
        "def f(x):\n    if x:\n        a()\n        b()\n"
    )


def test_a_source_has_its_helpers_and_constants() -> None:
    from halimede.kernels.gpu.float8 import float32_to_e4m3

    assert "E4M3_MAX = 448.0" in kernel_source(float32_to_e4m3)
    assert "def _product_kernel" in kernel_source(_product_kernel)
    assert "def zeros" not in kernel_source(_product_kernel)
