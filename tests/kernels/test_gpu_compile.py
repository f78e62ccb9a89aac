"""Every kernel, compiled for every target: no spills, the instructions it is written for, the size it had."""

import dataclasses
from pathlib import Path

import pytest
import triton

from halimede.kernels import gate
from halimede.kernels.gate import Line, Numbers, examine
from halimede.kernels.spec import KernelSpec, all_kernels
from halimede.kernels.target import TARGETS, Target

ROOT = Path(__file__).parents[2]
BASELINES = ROOT / "tests/kernels/baselines"
BASELINE = gate.read_baseline(gate.baseline_path(BASELINES))
REFRESH = "`make baseline` stores what the machine code is now (docs/kernels.md)"
BUILDS = [
    pytest.param(spec, target, id=f"{spec.name}-{target.name}")
    for spec in all_kernels().values()
    for target in TARGETS.values()
]
SPEC = all_kernels()["add_rms_norm"]
GOOD = Numbers(
    registers=40,
    spill_bytes=0,
    shared_bytes=1024,
    instructions=1000,
    matrix=8,
    group_matrix=8,
    wide_percent=90,
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests compile is neither taken from the user's cache nor left there."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(("spec", "target"), BUILDS)
def test_machine_code_keeps_the_rules_and_the_baseline(spec: KernelSpec, target: Target) -> None:
    found = examine(spec, target, BASELINE)
    assert not found.problems, "\n".join([*found.problems, REFRESH])
    assert not found.stale, "\n".join(["these are not as in the baseline:", *found.stale, REFRESH])
    assert found.num_compiled == (gate.sampled_signature(spec, target) is not None)


def test_versions_that_are_tested_have_a_baseline_without_leftovers() -> None:
    if triton.__version__ in (ROOT / "triton-versions.txt").read_text().split():
        assert BASELINE, REFRESH
        assert {name.split("|")[0] for name in BASELINE} == all_kernels().keys(), REFRESH


def _altered(**numbers: int) -> Numbers:
    return dataclasses.replace(GOOD, **numbers)


@pytest.mark.parametrize(
    ("numbers", "complaint"),
    [
        ({"registers": 45}, "registers went from 40 to 45"),
        ({"shared_bytes": 2048}, "shared_bytes went from 1024 to 2048"),
        ({"instructions": 1101}, "instructions went from 1000 to 1101"),
        ({"matrix": 0}, "no matrix instructions"),
        ({"group_matrix": 0}, "no group_matrix instructions"),
        ({"wide_percent": 79}, "79 % of all"),
    ],
)
def test_what_got_worse_is_told(numbers: dict[str, int], complaint: str) -> None:
    (problem,) = gate._compare("k|s|sm_90|f", GOOD, _altered(**numbers))
    assert complaint in problem


def test_small_differences_and_improvements_are_no_problem() -> None:
    near = _altered(registers=44, shared_bytes=1500, instructions=1030, wide_percent=80)
    assert gate._compare("k|s|sm_90|f", GOOD, near) == []
    assert gate._compare("k|s|sm_90|f", GOOD, _altered(registers=20, instructions=10, shared_bytes=0)) == []


@pytest.mark.parametrize(
    ("numbers", "complaint"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 300_000}, "300000 bytes of shared memory"),
        ({"matrix": 0, "group_matrix": 0}, "no wgmma instructions"),
        ({"group_matrix": 0}, "no wgmma instructions"),
    ],
)
def test_each_rule_is_held(numbers: dict[str, int], complaint: str) -> None:
    spec = dataclasses.replace(SPEC, matrix_product=True)
    lines = {"k|s|sm_90|f": Line("", _altered(**numbers))}
    (problem,) = gate.broken_rules(spec, TARGETS["sm_90"], lines)
    assert complaint in problem


def test_one_signature_with_wide_loads_is_enough() -> None:
    narrow, wide = Line("", _altered(wide_percent=0)), Line("", GOOD)
    target = TARGETS["sm_90"]
    assert gate._narrow_loads(SPEC, target, {"k|a|sm_90|f": narrow, "k|b|sm_90|f#2": wide}) == []
    assert len(gate._narrow_loads(SPEC, target, {"k|a|sm_90|f": narrow, "k|a|sm_90|g": wide})) == 1


def test_a_baseline_that_is_not_of_the_source_is_stale(tmp_path: Path) -> None:
    target = next(
        TARGETS[t] for t in gate.FAMILIES[2] if gate.sampled_signature(SPEC, TARGETS[t]) is not None
    )
    sample = examine(SPEC, target, None)
    assert (sample.num_compiled, sample.stale, sample.problems) == (1, [], [])
    ((name, line),) = sample.lines.items()
    gone = f"add_rms_norm|gone|{target.name}|_rms_norm_kernel"
    path = tmp_path / "baseline.json"
    gate.write_baseline(path, {name: line, gone: line})
    stored = gate.read_baseline(path)
    assert stored is not None
    assert stored[name] == line
    found = examine(SPEC, target, stored)
    assert found.num_compiled == len(SPEC.signatures)
    assert gone in found.stale
    assert name not in found.stale
    assert len(found.stale) == len(SPEC.signatures)
    assert examine(SPEC, target, found.lines).num_compiled == 1
    wrong = {n: Line("0", line.numbers) for n, line in found.lines.items()}
    assert len(examine(SPEC, target, wrong).stale) == len(SPEC.signatures)


def test_every_kernel_is_compiled_once_in_every_family() -> None:
    assert sorted(sum(gate.FAMILIES, ())) == sorted(TARGETS)
    for spec in all_kernels().values():
        chosen = [name for name in TARGETS if gate.sampled_signature(spec, TARGETS[name]) is not None]
        assert [len(set(chosen) & set(family)) for family in gate.FAMILIES] == [1, 1, 1, 1]


def test_bytes_of_loads_are_read_from_the_text() -> None:
    ptx = """
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        ld.global.L1::evict_last.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];
        ld.global.b16 { %rs1 }, [ %rd2 + 0 ];
        ld.param.b64 %rd1, [k_param_0];
        cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
        cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, 0x4;
    """
    assert sorted(gate._ptx_loads(ptx)) == [2, 4, 8, 16, 16]
    amd = [
        "buffer_load_dwordx4 v[0:3], v0, s[0:3], 0 offen",
        "global_load_b128 v[0:3], v0, s[0:1]",
        "global_load_dwordx2 v[0:1], v0, s[0:1]",
        "buffer_load_dword v0, s[0:3], 0 offen lds",
        "global_load_d16_hi_b16 v0, v1, s[0:1]",
        "buffer_load_ushort v0, v1, s[0:3], 0 offen",
        "global_load_ubyte v0, v1, s[0:1]",
        "global_store_dwordx4 v0, v[0:3], s[0:1]",
    ]
    assert sorted(gate._amd_loads(amd)) == [1, 2, 2, 4, 8, 16, 16]
    assert gate._wide_percent([16, 16, 8]) == 80
    assert gate._wide_percent([]) == 100
