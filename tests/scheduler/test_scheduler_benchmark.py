"""benchmarks/scheduler.py at sizes that take no time: it must go on to run and to write what it says."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = {
    "--running": (1, 3),
    "--batch": (3,),
    "--context": (16, 40),
    "--finished": (0, 7),
    "--waiting": (0, 5),
    "--steps": (4,),
    "--warmup": (1,),
    "--rounds": (2,),
}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("scheduler")


def test_every_sweep_is_run_and_written(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plots: list[str] = []
    monkeypatch.setattr(benchmark.report, "has_plots", lambda: True)
    monkeypatch.setattr(
        benchmark.report, "write_plot", lambda path, *args, **options: plots.append(path.name)
    )
    monkeypatch.setattr(benchmark, "load_tokenizer", lambda path: None)
    sizes = [str(word) for option, values in TINY.items() for word in (option, *values)]
    benchmark.main([*sizes, "--tokenizer", "none.gguf", "--out", str(tmp_path)])
    data: dict[str, Any] = json.loads((tmp_path / "scheduler.json").read_text())
    assert list(data["sweeps"]) == sorted(benchmark.SWEEPS)
    for entries in data["sweeps"].values():
        for entry in entries:
            step = entry["us"]["step"]
            assert 0 < step["min"] <= step["median"] <= step["p90"] <= step["p99"]
            assert step["min"] >= entry["us"]["schedule"]["min"] > 0
    text = (tmp_path / "scheduler.md").read_text()
    assert all(f"## {title}" in text for title in benchmark.SWEEPS.values())
    assert text.count("\n| 3 |") == 2
    assert "## Running sequences" in capsys.readouterr().out
    assert sorted(plots) == ["scheduler-flat.png", "scheduler-running.png", "scheduler-text.png"]


def test_help_names_every_sweep(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in benchmark.SWEEPS)


def test_a_case_is_in_the_state_it_names(benchmark: ModuleType) -> None:
    steps = importlib.import_module("scheduler_steps")
    engine = steps.TimedEngine(steps.Case(3, context=20, waiting=4, finished=5), 16, None)
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (3, 4)
    for _ in range(16):
        engine.step()
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (3, 4)
