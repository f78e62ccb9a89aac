"""`halimede tune` as far as it goes without a GPU: what it finds and writes, and that serving follows."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_tiny_checkpoint

from halimede import EngineConfig
from halimede.engine.build import open_model
from halimede.engine.cli import tune as tune_module
from halimede.engine.cli.main import main
from halimede.engine.executor.settings import resolve_settings
from halimede.engine.warmup.serving import open_serving_kernels
from halimede.errors import KernelError
from halimede.kernels.specialise import Specialisation
from halimede.kernels.store import KernelEntry, KernelStore
from halimede.kernels.target import TARGETS, Target
from halimede.kernels.tune import Bench, Tools
from halimede.kernels.tune_journal import Journal
from halimede.kernels.tuning import KernelConfig, read_table, user_table_path

Run = Callable[..., str]
BEST = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that ends with `status`; what it printed, errors last."""

    def run(*arguments: object, status: int = 0) -> str:
        with pytest.raises(SystemExit) as end:
            main([*map(str, arguments)])
        printed = capsys.readouterr()
        assert end.value.code == status, printed
        return printed.out + printed.err

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Target:
    """That the machine seems to have; launchers have chosen nothing for it yet."""
    own = replace(TARGETS["sm_90"])
    monkeypatch.setattr(tune_module, "_target_here", lambda name: own)
    return own


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU on which BEST is fastest; and the case of each measurement that was made there."""
    found: list[str] = []

    class Pretended:
        def __init__(self, name: str) -> None:
            self._name = name

        def seconds(self, config: KernelConfig) -> float:
            found.append(self._name)
            return 5e-6 if config.blocks == BEST else 8e-6

    @contextlib.contextmanager
    def open_bench(spec: Any, case: Any, own: KernelConfig) -> Iterator[Bench]:
        yield Pretended(case.name)

    def build(wanted: Sequence[Specialisation]) -> dict[str, KernelEntry | str]:
        return {one.key: _entry(one) for one in wanted}

    monkeypatch.setattr(
        tune_module, "_tools", lambda target, store, journal: Tools(build, open_bench, journal, "a GPU")
    )
    return found


def _entry(one: Specialisation) -> KernelEntry:
    return KernelEntry(
        key=one.key,
        kernel=one.name,
        target=one.target.machine,
        signature={},
        constants={},
        options={},
        triton="3.9.0",
        source="",
        entry_point="",
        threads=32,
        shared_memory=0,
        registers=1,
        spills=0,
        sha256=one.key,
        size=1,
    )


def test_without_a_gpu_it_says_so(model: Path, run: Run) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    said = run("tune", model, status=1)
    assert said.startswith("error: tuning measures kernels on a GPU, and torch finds none here; run it on ")


def test_another_target_than_the_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("halimede.kernels.target.target_of_device", lambda device: TARGETS["sm_90"])
    assert tune_module._target_here("auto") is tune_module._target_here("sm_90") is TARGETS["sm_90"]
    with pytest.raises(KernelError, match="at hand, which is sm_90, so it cannot tune for gfx942; leave"):
        tune_module._target_here("gfx942")


def test_shapes_are_those_of_serving(model: Path, target: Target) -> None:
    config = EngineConfig(model=str(model), load_format="dummy")
    for max_batch, rows in ((None, ["1", "16"]), (8, ["1"])):
        (tunable,) = tune_module.find(config, target, ["gated_matmul"], max_batch)
        assert (tunable.key, tunable.size) == ("torch.bfloat16,64", 112)
        assert [case.name.partition(" ")[0] for case in tunable.cases] == rows
    with pytest.raises(KernelError, match=r"nonsense cannot be tuned; use some of: .*gated_matmul"):
        tune_module.find(config, target, ["nonsense"], None)


def test_what_is_found_is_written_printed_and_followed_by_serving(
    model: Path, target: Target, measured: list[str], run: Run, tmp_path: Path
) -> None:
    arguments = ("tune", model, "--kernels", "gated_matmul", "--kernel-cache-dir", tmp_path)
    said = run(*arguments)
    path = user_table_path(tmp_path, "sm_90")
    (entries,) = read_table(path)["gated_matmul"].values()
    assert [config.blocks for _, config in entries] == [BEST]
    row = said.splitlines()[0].split("\t")
    assert (row[0], row[3:6]) == ("gated_matmul", ["8.0", "5.0", "1.60x"])
    assert "BLOCK_N=64" in row[6]
    assert f"1 of 1 choices are better now, in {path}; run `halimede warmup` again" in said

    def blocks(folder: Path) -> list[int]:
        config = EngineConfig(model=str(model), load_format="dummy", kernel_cache_dir=str(folder))
        _, model_config = open_model(config)
        settings = resolve_settings(config, model_config, torch.device("meta"))
        fresh = replace(TARGETS["sm_90"])
        kernels = open_serving_kernels(config, model_config, settings, fresh)
        return [one.constants["BLOCK_N"] for one in kernels._specialisations if "_gated_matmul" in one.name]

    assert blocks(tmp_path) == [64]
    assert blocks(tmp_path / "other") == [32]


def test_a_second_run_goes_on_and_a_new_one_does_not(
    model: Path, target: Target, measured: list[str], run: Run, tmp_path: Path
) -> None:
    arguments = ("tune", model, "--kernels", "gated_matmul", "-o", tmp_path / "table.json")
    run(*arguments, "--budget", "0")
    assert len(measured) == 2  # its own choice for both shapes
    assert json.loads((tmp_path / "table.json").read_text()) == {}
    said = run(*arguments)
    first = len(measured)
    assert read_table(tmp_path / "table.json").keys() == {"gated_matmul"}
    assert "1 of 1 choices are better now" in said
    del measured[:]
    run(*arguments)
    in_turns = len(measured)
    assert 0 < in_turns < first
    del measured[:]
    run(*arguments, "--no-resume")
    assert len(measured) == first


def test_a_model_without_such_kernels_is_told(
    model: Path, target: Target, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_module, "find", lambda *arguments: [])
    assert run("tune", model) == f"serving {model} launches no kernel that can be tuned\n"


def test_candidates_are_built_in_processes_and_failures_are_told(
    model: Path, target: Target, tmp_path: Path
) -> None:
    config = EngineConfig(model=str(model), load_format="dummy")
    (tunable,) = tune_module.find(config, target, ["gated_matmul"], None)
    from halimede.kernels.tune_space import plan

    wanted = plan(tunable, tunable.own, target).specialisations
    impossible = replace(wanted[0], constants={**wanted[0].constants, "BLOCK_N": 17})
    store = KernelStore(tmp_path)
    built = tune_module._build([*wanted, impossible], store=store, jobs=1)
    good, bad = built[wanted[0].key], built[impossible.key]
    assert isinstance(good, KernelEntry)
    assert good.sha256
    assert isinstance(bad, str)
    assert "power of 2" in bad
    assert Journal(None).get("nothing") is None
