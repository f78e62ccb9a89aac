"""The example of docs/kernels.md is a kernel that holds; the README's table is that of the baselines."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from kernel_parity import check_case, notices

from halimede.errors import KernelError
from halimede.kernels.compile import compile_case
from halimede.kernels.gate import WIDE_PERCENT, measure
from halimede.kernels.target import TARGETS
from halimede.kernels.tuning import pick_config, read_table

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/kernels.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    (source,) = _blocks("python")
    path = tmp_path_factory.mktemp("example") / "scaled_sum.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("scaled_sum", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "scaled_sum", module)
        spec.loader.exec_module(module)
    sys.modules["scaled_sum"] = module
    return module


def test_the_example_equals_its_reference(example: ModuleType) -> None:
    (spec,) = example.SPECS
    for case in spec.cases:
        check_case(spec, case)


def test_a_broken_example_is_noticed(example: ModuleType, tmp_path: Path) -> None:
    (spec,) = example.SPECS
    assert all(notices(spec, fault, tmp_path) for fault in spec.faults)


def test_the_example_checks_what_it_is_given(example: ModuleType) -> None:
    with pytest.raises(KernelError, match=r"call \.contiguous"):
        example.scaled_sum(torch.zeros(3), torch.zeros(4), 1.0)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_example_keeps_the_gates_rules(
    example: ModuleType, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (spec,) = example.SPECS
    (build,) = compile_case(spec, spec.signatures[0], TARGETS[target])
    numbers = measure(build, TARGETS[target])
    assert numbers.spill_bytes == 0
    assert numbers.wide_percent >= WIDE_PERCENT


def test_the_tuned_table_of_the_documentation_is_one(tmp_path: Path) -> None:
    (text,) = _blocks("json")
    path = tmp_path / "sm_90.json"
    path.write_text(text)
    table = read_table(path)
    target, heuristic = TARGETS["sm_90"], pytest.fail

    def block(size: int) -> int:
        picked = pick_config("scaled_sum", target, "torch.bfloat16", size, heuristic, table=table)
        return picked.blocks["BLOCK"]

    assert [block(4096), block(4097), block(1 << 30)] == [512, 2048, 2048]
    assert json.loads(text).keys() == {"scaled_sum"}


def test_the_readmes_table_is_up_to_date() -> None:
    script = ROOT / "scripts/kernel_table.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
