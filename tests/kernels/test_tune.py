"""Tuning without a GPU: what is found, tried, left out, measured, remembered and written."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from halimede.errors import KernelError
from halimede.kernels.build import build
from halimede.kernels.gpu.gated_matmul import gated_matmul
from halimede.kernels.launch import Launch, Variant, intercepting, target_of
from halimede.kernels.spec import Case, KernelSpec, Tensors, TuningSpace, all_kernels
from halimede.kernels.specialise import Specialisation
from halimede.kernels.store import KernelEntry
from halimede.kernels.target import TARGETS, Target
from halimede.kernels.tune import Bench, Tools, Tuned, tune
from halimede.kernels.tune_bench import ConfigBench
from halimede.kernels.tune_journal import Journal
from halimede.kernels.tune_space import Tunable, find_tunables, tunable_specs
from halimede.kernels.tuning import (
    KernelConfig,
    Pick,
    overriding,
    pick_config,
    tuned_bucket,
)

SM_90 = TARGETS["sm_90"]
CPU, META = torch.device("cpu"), torch.device("meta")


def config(block: int, warps: int = 1, **options: int) -> KernelConfig:
    return KernelConfig({"BLOCK": block}, num_warps=warps, num_stages=1, options=options)


@triton.jit(do_not_specialize=["size"])
def _twice_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if BLOCK == 128:  # a config whose result is wrong: it leaves the last one as it was
        size -= 1
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < size) * 2, mask=at < size)


VARIANTS: dict[tuple[Target, int], Variant] = {}


def twice(x: torch.Tensor) -> torch.Tensor:
    """With a variant that is kept for the target, as launchers do."""
    target, bucket = target_of(x), 64 if x.numel() <= 64 else 1024
    key = (target, bucket)
    if key not in VARIANTS:
        chosen = pick_config("twice", target, f"{x.dtype}", bucket, lambda: config(16))
        if chosen.blocks["BLOCK"] == 512:
            raise KernelError("no block of 512")
        VARIANTS[key] = Variant(_twice_kernel, chosen)
    variant, y = VARIANTS[key], torch.empty_like(x)
    variant.start((-(-x.numel() // variant.constants["BLOCK"]),), x, y, x.numel())
    return y


def _case(size: int, dtype: torch.dtype = torch.float32) -> Case:
    return Case(f"{size} {dtype}", lambda device: {"x": torch.randn(size, device=device).to(dtype)})


def _configs(target: Target, launch: Launch) -> list[KernelConfig]:
    assert launch.config == config(16)
    return [config(16), *[config(block) for block in (32, 64, 128, 512)], config(32, 2), config(32)]


SPEC = KernelSpec(
    name="twice",
    summary="",
    launcher=lambda x: (twice(x),),
    reference=lambda x: (x * 2,),
    tolerance="norm",
    cases=(),
    signatures=(),
    faults=(),
    space=TuningSpace(
        _twice_kernel, _configs, lambda launch: _case(launch.args[0].numel(), launch.args[0].dtype), 1e-6
    ),
)


def launches_of(*sizes: int) -> list[Launch]:
    found: list[Launch] = []
    with intercepting(SM_90, found.append):
        for size in sizes:
            twice(torch.empty(size, device=META))
    return found


def tunables_of(*sizes: int) -> list[Tunable]:
    return find_tunables(launches_of(*sizes), SM_90, [SPEC])


class Machine:
    """Pretends to build and to time: a time for each config, and what was asked for."""

    def __init__(self, times: Mapping[int, float], spills: Sequence[int] = (), shared: Sequence[int] = ()):
        self.times, self.spills, self.shared = times, spills, shared
        self.built: list[Specialisation] = []
        self.measured: list[tuple[str, int, int]] = []
        self.now = 0.0
        self.entries: dict[str, KernelEntry] = {}
        self.fail: Callable[[int], Exception | None] = lambda block: None
        self.journal = Journal(None)

    def build(self, wanted: Sequence[Specialisation]) -> dict[str, KernelEntry | str]:
        self.built += wanted
        found: dict[str, KernelEntry | str] = {}
        for one in wanted:
            block, warps = one.constants["BLOCK"], one.options["num_warps"]
            code = f"{block} {warps if block != 32 else 1}"  # one of 32 is the same with other warps
            found[one.key] = _entry(
                one, code, 8 if block in self.spills else 0, 1 << 20 if block in self.shared else 0
            )
        return found

    @contextlib.contextmanager
    def open_bench(self, spec: KernelSpec, case: Case, own: KernelConfig) -> Iterator[Bench]:
        """Checks on the CPU, and says what the machine's times are."""
        current: list[KernelConfig] = []

        def time_calls(calls: Sequence[Callable[[], Any]]) -> float:
            return self.times[current[-1].blocks["BLOCK"]]

        bench = ConfigBench(spec, case, own, SM_90, CPU, time_calls)
        machine = self

        class Recorded:
            def seconds(self, config: KernelConfig) -> float:
                current.append(config)
                block = config.blocks["BLOCK"]
                machine.measured.append((case.name, block, config.num_warps))
                machine.now += 1.0
                if error := machine.fail(block):
                    raise error
                return bench.seconds(config)

        yield Recorded()

    @property
    def tools(self) -> Tools:
        return Tools(self.build, self.open_bench, self.journal, "a GPU", clock=lambda: self.now)

    def tune(self, *sizes: int, budget: float = math.inf) -> list[Tuned]:
        return list(tune(tunables_of(*sizes), SM_90, self.tools, budget=budget))


def _entry(one: Specialisation, code: str, spills: int, shared: int) -> KernelEntry:
    return KernelEntry(
        key=one.key,
        kernel=one.name,
        target="sm_90",
        signature={},
        constants={},
        options={},
        triton="3.9.0",
        source="",
        entry_point="",
        threads=32,
        shared_memory=shared,
        registers=1,
        spills=spills,
        sha256=code,
        size=1,
    )


# --- what launchers choose


def test_an_override_is_met_by_its_own_target_only_and_hides_nothing() -> None:
    VARIANTS.clear()
    started: list[Launch] = []

    def block_of(target: Target) -> int:
        with intercepting(target, started.append):
            twice(torch.empty(40, device=META))
        return int(started[-1].constants["BLOCK"])

    assert block_of(SM_90) == 16  # kept
    asked: list[Pick] = []

    def choose(pick: Pick) -> KernelConfig:
        asked.append(pick)
        return config(64)

    with overriding(SM_90, choose) as own:
        assert (own.name, own.machine, own.shared_memory) == ("sm_90", "sm_90", SM_90.shared_memory)
        assert [block_of(own), block_of(SM_90), block_of(own)] == [64, 16, 64]
    assert block_of(SM_90) == 16
    assert [(pick.kernel, pick.key, pick.size) for pick in asked] == [("twice", "torch.float32", 64)]
    with overriding(SM_90, lambda pick: None) as other:
        assert block_of(other) == 16
        assert block_of(own) == 64  # as it was made


def test_a_bucket_is_the_size_itself_while_tuning() -> None:
    assert tuned_bucket("twice", SM_90, 17) == 0
    with overriding(SM_90, lambda pick: None) as own:
        assert tuned_bucket("twice", own, 17) == 17
        assert tuned_bucket("twice", SM_90, 17) == 0


# --- what there is to tune


def test_shapes_of_one_choice_are_tuned_together() -> None:
    few, many = tunables_of(40, 50, 40, 900)
    assert [(one.key, one.size) for one in (few, many)] == [("torch.float32", 64), ("torch.float32", 1024)]
    assert [case.name for case in few.cases] == ["40 torch.float32", "50 torch.float32"]
    assert few.own == config(16)
    assert few.configs == (config(16), *[config(b) for b in (32, 64, 128, 512)], config(32, 2))


def test_launches_of_other_kernels_and_of_nothing_are_left_out() -> None:
    assert find_tunables(launches_of(0, 40), SM_90, [replace(SPEC, space=None)]) == []
    assert tunables_of(0) == []


def test_names_are_those_of_specs_with_a_space() -> None:
    specs = {"twice": SPEC, "plain": replace(SPEC, name="plain", space=None)}
    assert tunable_specs(specs, []) == tunable_specs(specs, ["twice"]) == [SPEC]
    with pytest.raises(KernelError, match="plain, none cannot be tuned; use some of: twice"):
        tunable_specs(specs, ["plain", "twice", "none"])


# --- the search


def test_the_fastest_right_config_is_chosen() -> None:
    machine = Machine({16: 10e-6, 32: 9e-6, 64: 7e-6, 128: 1e-6})
    (tuned,) = machine.tune(40)
    assert (tuned.chosen, tuned.is_better, tuned.is_complete) == (config(64), True, True)
    assert tuned.left_out == {
        "refused by the launcher": 1,
        "the code of another one": 1,
        "a wrong result, or none": 1,
    }
    assert [(one.case, one.own, one.chosen) for one in tuned.timings] == [("40 torch.float32", 10e-6, 7e-6)]
    # Each once, and then those that are faster in turns with the own choice.
    blocks = [block for _, block, _ in machine.measured]
    assert blocks[:4] == [16, 32, 64, 128]
    assert blocks[4:] == [16, 64, 32] * 5


def test_what_spills_or_does_not_fit_is_not_measured() -> None:
    machine = Machine({16: 10e-6, 32: 9e-6, 64: 7e-6, 128: 9e-6}, spills=[64], shared=[32])
    (tuned,) = machine.tune(40)
    assert (tuned.chosen, tuned.is_better) == (config(16), False)
    assert tuned.left_out["registers spill"] == 1
    assert tuned.left_out["too much shared memory"] == 2
    assert {block for _, block, _ in machine.measured} == {16, 128}


def test_own_choice_is_measured_even_if_it_spills() -> None:
    machine = Machine({16: 10e-6, 32: 20e-6, 64: 7e-6, 128: 9e-6}, spills=[16])
    assert machine.tune(40)[0].chosen == config(64)


@pytest.mark.parametrize(("seconds", "is_better"), [(9.81e-6, False), (9.79e-6, True), (11e-6, False)])
def test_noise_is_no_gain(seconds: float, is_better: bool) -> None:
    (tuned,) = Machine({16: 10e-6, 32: seconds, 64: 12e-6, 128: 1e-6}).tune(40)
    assert tuned.is_better is is_better
    assert tuned.chosen == config(32 if is_better else 16)
    assert tuned.timings[0].chosen == (seconds if is_better else 10e-6)


def test_one_choice_is_best_for_all_of_its_shapes_together() -> None:
    machine = Machine({16: 10e-6, 32: 9e-6, 64: 8e-6, 128: 1e-6})
    (tuned,) = machine.tune(40, 50)
    assert [one.case for one in tuned.timings] == ["40 torch.float32", "50 torch.float32"]
    assert tuned.chosen == config(64)
    assert len(machine.measured) == 2 * 3 + 1 + 2 * 3 * 5  # a wrong one is not timed for the other shape


def test_a_budget_is_shared_and_the_own_choice_always_measured() -> None:
    machine = Machine({16: 10e-6, 32: 20e-6, 64: 20e-6, 128: 20e-6})
    few, many = machine.tune(40, 900, budget=4.0)
    assert (few.measured, few.is_complete) == (2, False)
    assert (many.measured, many.is_complete) == (2, False)
    (none,) = Machine({16: 10e-6}).tune(40, budget=0.0)
    assert (none.measured, none.is_complete, none.is_better) == (1, False, False)


def test_own_choice_that_fails_is_told_and_nothing_chosen() -> None:
    machine = Machine({16: 1.0})
    machine.fail = lambda block: KernelError("too large") if block == 16 else None
    (tuned,) = machine.tune(40)
    assert (tuned.problem, tuned.is_better, tuned.timings) == ("too large", False, ())
    broken = replace(machine.tools, build=lambda wanted: {one.key: "no compiler" for one in wanted})
    assert next(tune(tunables_of(40), SM_90, broken)).problem == "no compiler"


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "sm_90.journal"
    times = {16: 10e-6, 32: 9e-6, 64: 20e-6, 128: 1e-6}
    first = Machine(times)
    first.journal = Journal(path)
    first.tune(40, budget=2.0)
    assert [block for _, block, _ in first.measured][:2] == [16, 32]
    with path.open("a") as file:
        file.write('{"id": "torn')
    second = Machine(times)
    second.journal = Journal(path)
    (tuned,) = second.tune(40)
    assert [block for _, block, _ in second.measured][:2] == [64, 128]
    assert (tuned.chosen, tuned.is_complete) == (config(32), True)
    third = Machine(times)
    third.journal = Journal(path)
    third.tune(40)
    assert {block for _, block, _ in third.measured} == {16, 32}  # in turns, anew
    assert len([json.loads(line) for line in path.read_text().splitlines() if "torn" not in line]) == 4
    other = Machine(times)
    other.journal = Journal(path)
    list(tune(tunables_of(40), SM_90, replace(other.tools, device="another GPU")))
    assert [block for _, block, _ in other.measured][:4] == [16, 32, 64, 128]
    again = Machine(times)
    again.journal = Journal(path, resume=False)
    again.tune(40)
    assert [block for _, block, _ in again.measured][:4] == [16, 32, 64, 128]


def test_a_config_that_breaks_the_gpu_is_left_out_by_the_next_run(tmp_path: Path) -> None:
    machine = Machine({16: 10e-6, 32: 9e-6, 64: 7e-6, 128: 1e-6})
    machine.journal = Journal(tmp_path / "journal")
    machine.fail = lambda block: RuntimeError("illegal address") if block == 64 else None
    with pytest.raises(KernelError, match=r"while twice \(40 .*BLOCK=64 .*illegal address; run the same"):
        machine.tune(40)
    machine = Machine(machine.times)
    machine.journal = Journal(tmp_path / "journal")
    (tuned,) = machine.tune(40)
    assert tuned.chosen == config(32)
    assert 64 not in {block for _, block, _ in machine.measured}


def test_large_cases_are_held_against_the_own_choice() -> None:
    def no_reference(x: torch.Tensor) -> Tensors:
        raise AssertionError("too slow")

    from halimede.kernels.spec import Work

    case = replace(_case(40), work=Work(bytes=1, flops=3_000_000_000_000))
    bench = ConfigBench(
        replace(SPEC, reference=no_reference), case, config(16), SM_90, CPU, lambda calls: 1.0
    )
    assert bench.seconds(config(64)) == 1.0
    with pytest.raises(KernelError, match="is off by inf of its largest value; 1e-06 is allowed"):
        bench.seconds(config(128))


# --- the spaces that there are


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942", "gfx1100"])
@pytest.mark.parametrize("name", [name for name, spec in all_kernels().items() if spec.space is not None])
def test_spaces_lead_back_to_their_launches(name: str, target: str) -> None:
    """Cases of a launch start the same kernel for the same shapes, and all configs are for its launcher."""
    spec, found = all_kernels()[name], list[Launch]()
    assert spec.space is not None
    with intercepting(TARGETS[target], found.append), torch.device("meta"):
        for case in spec.signatures:
            spec.launcher(**case.make(META))
    tunables = find_tunables(found, TARGETS[target], [spec])
    assert tunables
    for tunable in tunables:
        assert len(tunable.configs) > 5
        assert len({tuple(sorted(one.blocks)) for one in tunable.configs}) == 1
    own = [one for one in found if one.kernel is spec.space.kernel]
    for launch in own:
        again: list[Launch] = []
        with intercepting(TARGETS[target], again.append), torch.device("meta"):
            spec.launcher(**spec.space.case(launch).make(META))
        (same,) = [one for one in again if one.kernel is spec.space.kernel]
        assert same.grid == launch.grid
        assert same.specialise(TARGETS[target]).key == launch.specialise(TARGETS[target]).key


def test_gated_matmul_is_tuned_with_its_real_kernel() -> None:
    """Configs are built for an NVIDIA GPU and run in the interpreter; only the time is made up."""
    found: list[Launch] = []
    with intercepting(SM_90, found.append), torch.device("meta"):
        for rows in (1, 3):
            gated_matmul(
                torch.empty(rows, 128, dtype=torch.bfloat16), torch.empty(96, 128, dtype=torch.bfloat16)
            )
    spec = all_kernels()["gated_matmul"]
    (tunable,) = find_tunables(found, SM_90, [spec])
    assert [case.name for case in tunable.cases] == [
        "1 x 128 to 48, bfloat16, silu",
        "3 x 128 to 48, bfloat16, silu",
    ]
    few = [one for one in tunable.configs if one.blocks["BLOCK_N"] == 16 and one.blocks["BLOCK_K"] == 64][:3]
    tunable = replace(tunable, configs=(tunable.own, *few))
    entries = {}

    def build_all(wanted: Sequence[Specialisation]) -> dict[str, KernelEntry | str]:
        entries.update({one.key: build(one)[0] for one in wanted})
        return dict(entries)

    times = iter(range(1000, 0, -1))

    @contextlib.contextmanager
    def open_bench(spec: KernelSpec, case: Case, own: KernelConfig) -> Iterator[Bench]:
        yield ConfigBench(spec, case, own, SM_90, CPU, lambda calls: next(times) * 1e-6)

    (tuned,) = tune([tunable], SM_90, Tools(build_all, open_bench, Journal(None), "none"))
    assert tuned.problem is None
    assert tuned.measured + sum(tuned.left_out.values()) == len(tunable.configs)
    assert tuned.measured >= 2
    assert len(entries) == len(tunable.configs)  # rows make no other code
