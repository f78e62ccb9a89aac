"""What tuning tries for quantized products: configs that are right, near the launcher's own, and not many."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tolerances import assert_kernel_close

from halimede.kernels import launch
from halimede.kernels.gpu import scaled_cases, scaled_config, wna16_cases, wna16_config
from halimede.kernels.gpu.scaled_matmul import scaled_matmul
from halimede.kernels.gpu.scaled_operand import Scaling
from halimede.kernels.gpu.wna16_layout import UNIT, Facts
from halimede.kernels.launch import Launch, intercepting
from halimede.kernels.spec import Case, KernelSpec, all_kernels
from halimede.kernels.target import TARGETS, Target
from halimede.kernels.tune_bench import difference, forcing
from halimede.kernels.tune_space import config_id, find_tunables
from halimede.kernels.tuning import KernelConfig, Pick, overriding

SM_90 = TARGETS["sm_90"]
META = torch.device("meta")
SHAPES = ((6144, 4096), (4096, 14336), (28672, 4096), (70, 256))
MOST = 32
"""Configs of a choice: each is a second of a processor to compile."""

_wna16, _scaled = wna16_cases._case, scaled_cases._case
CASES: tuple[tuple[str, Case], ...] = (
    ("wna16_matmul", _wna16("3 rows", 3, 1024, 75, kinds="zeros", laid_out=True)),
    ("wna16_matmul", _wna16("gate and up", 40, 512, 96, activation="silu", laid_out=True)),
    ("wna16_matmul", _wna16("70 rows, offsets", 70, 512, 130, 4, 32, kinds="offsets", laid_out=True)),
    ("scaled_matmul", _scaled("fp8, 3 rows", 3, 2048, 75, laid_out=True)),
    ("scaled_matmul", _scaled("fp8, 20 rows", 20, 1024, 130, bias=True, laid_out=True)),
    ("scaled_matmul", _scaled("int8", 70, 512, 130, torch.int8, zeros="row", laid_out=True)),
    ("scaled_matmul", _scaled("blocks", 300, 256, 130, block=(128, 128), laid_out=True)),
    ("scaled_matmul", _scaled("wide", 20, 1024, 70, wide=True, laid_out=True)),
)


def _launches(spec: KernelSpec, case: Case, target: Target) -> list[Launch]:
    found: list[Launch] = []
    with intercepting(target, found.append), torch.device("meta"):
        spec.launcher(**case.make(META))
    return found


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize(("name", "case"), [pytest.param(*one, id=one[1].name) for one in CASES])
def test_every_config_gives_the_result(
    name: str, case: Case, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for its stages, which the interpreter does not know."""
    monkeypatch.setattr(launch, "INTERPRETED_TARGET", TARGETS[target])
    spec = all_kernels()[name]
    (tunable,) = find_tunables(_launches(spec, case, TARGETS[target]), TARGETS[target], [spec])
    torch.manual_seed(0)
    with forcing(spec, tunable.own, TARGETS[target]):
        given = tunable.cases[0].make(torch.device("cpu"))
    (expected,) = spec.reference(**given)
    distinct = {config_id(_without_stages(one)): one for one in tunable.configs}
    assert len(distinct) > 2
    for config in distinct.values():
        with forcing(spec, config, TARGETS[target]):
            (found,) = spec.launcher(**given)
        assert_kernel_close(found, expected, spec.tolerance)
        assert spec.space is not None
        assert difference(found, expected) < spec.space.error
        if given["weight"].counters is not None:
            assert not given["weight"].counters.any(), config_id(config)


def _without_stages(config: KernelConfig) -> KernelConfig:
    return KernelConfig({**config.blocks, "STAGES": 0}, config.num_warps, 0)


def _wna16_spaces(target: Target) -> Iterator[tuple[int, list[KernelConfig]]]:
    kinds = (("", False), ("zeros", True), ("offsets", False), ("table", False))
    for shape, (kind, gated), bits in itertools.product(SHAPES, kinds, (4, 8)):
        facts = Facts(
            shape, bits, 128, 8, kind == "zeros", kind == "offsets", kind == "table", target.backend, gated
        )
        for bucket in wna16_config.ROW_BUCKETS:
            own = wna16_config.config_for(target, facts, bucket, deterministic=False)
            found = wna16_config.candidates(target, facts, bucket)
            assert found[0] == own
            for one in found:
                splits, groups = one.blocks["SPLITS"], one.blocks["WARP_GROUPS"]
                assert splits in (1, own.blocks["SPLITS"]) or shape[1] // UNIT >= 2 * splits
                assert groups == one.num_warps // 4
                assert one.blocks["BLOCK_N"] >= 64 * groups
                assert facts.can_scale_sums or not one.blocks["SCALE_SUMS"]
            yield bucket, found


def _scaled_spaces(target: Target) -> Iterator[tuple[int, list[KernelConfig]]]:
    kinds: tuple[Any, ...] = (("int8", None), ("fp8", None), ("fp8", (128, 128)), ("wide", None))
    for shape, (kind, block), unit in itertools.product(SHAPES, kinds, (1, 16)):
        scaling = Scaling(shape, kind, block)
        for bucket in scaled_config.ROW_BUCKETS:
            own = scaled_config.config_for(target, scaling, bucket, unit, deterministic=False)
            found = scaled_config.candidates(target, scaling, bucket, unit)
            assert found[0] == own
            for one in found:
                for kept in ("PROMOTE", "BLOCK_K", "GROUP_M"):
                    assert one.blocks[kept] == own.blocks[kept], "these change results, or are no matter"
                described = unit == 16 and target.wgmma and kind != "wide" and bucket > 16
                assert described or not one.blocks["TMA"]
                assert block is None or one.blocks["BLOCK_K"] == 128
            yield bucket, found


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120", "gfx942", "gfx1100"])
@pytest.mark.parametrize("spaces", [_wna16_spaces, _scaled_spaces])
def test_spaces_are_sound_and_small(
    spaces: Callable[[Target], Iterator[tuple[int, list[KernelConfig]]]], target: str
) -> None:
    for bucket, found in spaces(TARGETS[target]):
        distinct = {config_id(one) for one in found}
        assert 3 < len(distinct) <= MOST, f"{len(distinct)} for {bucket} rows"
        for one in found:
            assert one.num_stages == one.blocks["STAGES"]
            assert one.blocks["BLOCK_M"] <= max(16, bucket)


def test_a_table_for_aligned_rows_is_not_followed_for_others() -> None:
    """Nor for a row alone: the tensor memory accelerator cannot read those."""
    asked: list[Pick] = []

    def choose(pick: Pick) -> KernelConfig:
        asked.append(pick)
        own = pick.heuristic()
        return KernelConfig({**own.blocks, "TMA": 1}, own.num_warps, own.num_stages)

    with overriding(SM_90, choose) as target:
        for rows, stride, expected in ((20, 0, 1), (20, 264, 0), (1, 0, 0)):
            case = scaled_cases._case("", rows, 256, 64, stride=stride, laid_out=True)
            (found,) = _launches(all_kernels()["scaled_matmul"], case, target)
            assert found.constants["TMA"] == expected
    assert len(asked) == 3


@pytest.mark.parametrize("name", ["wna16_matmul", "scaled_matmul"])
def test_deterministic_products_follow_no_table(name: str) -> None:
    cases = {"wna16_matmul": _wna16, "scaled_matmul": _scaled}
    asked: list[Pick] = []

    def choose(pick: Pick) -> None:
        asked.append(pick)

    for deterministic in (True, False):
        case = cases[name]("", 3, 256, 64, deterministic=deterministic, laid_out=True)  # type: ignore[operator]
        with overriding(SM_90, choose) as target:
            assert len(_launches(all_kernels()[name], case, target)) == 1
        assert len(asked) == (0 if deterministic else 1)


def test_the_reference_of_a_weight_that_is_laid_out_is_that_of_its_codes() -> None:
    torch.manual_seed(0)
    canonical = wna16_cases._canonical(96, 256, 4, 64, torch.bfloat16, "zeros", torch.device("cpu"))
    x = torch.randn(3, 256).to(torch.bfloat16)
    for activation in (None, "silu"):
        given: dict[str, Any] = {"x": x, "bias": None, "activation": activation, "deterministic": False}
        operand = wna16_cases.operand_of(**canonical, gated=activation is not None)
        (expected,) = wna16_cases.reference(**given, **canonical)
        (found,) = wna16_cases.reference(**given, weight=operand)
        torch.testing.assert_close(found, expected, rtol=8e-3, atol=1e-6)  # sums in another order


def test_scaled_products_are_started_as_they_are_tuned() -> None:
    """With what serving gives: one scale for all rows, zeros of one, codes whose rows lie apart."""
    case = scaled_cases._case("", 33, 128, 64, torch.int8, static=True, zeros="one", stride=160)
    spec = all_kernels()["scaled_matmul"]
    (one,) = _launches(spec, case, SM_90)
    again = scaled_cases.case_of(one)
    assert again.name == "33 x 128 to 64, int8, bfloat16, static, zeros a one, rows 160 apart"
    (other,) = _launches(spec, again, SM_90)
    assert other.specialise(SM_90).key == one.specialise(SM_90).key
    assert scaled_matmul.__name__ == spec.name
