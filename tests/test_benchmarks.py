"""The benchmarks run from end to end on a tiny model; their numbers mean nothing there."""

import importlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_tiny_checkpoint

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
HAS_PLOTS = importlib.util.find_spec("matplotlib") is not None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench") / "tiny"
    # Longer than max_model_len, which is the same for all engines.
    return write_tiny_checkpoint(
        directory, tokenizer=True, dtype=torch.bfloat16, max_position_embeddings=2048
    )


@pytest.fixture
def bench_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def small_calibration(bench_modules: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is measured with small matrices: a CPU may take 5 s for one product in bfloat16."""
    import machine

    script = tmp_path / "calibrate_small.py"
    script.write_text(
        "import runpy, torch\n"
        "randn = torch.randn\n"
        "torch.randn = lambda *shape: randn(*(size // 16 for size in shape))\n"
        f"runpy.run_path({str(BENCHMARKS / 'machine.py')!r}, run_name='__main__')\n"
    )
    monkeypatch.setattr(machine, "__file__", str(script))


def run(script: str, out: Path, *arguments: object) -> dict[str, Any]:
    """The JSON that the script writes."""
    importlib.import_module(script).main(list(map(str, ["--quick", "--out", out, *arguments])))
    assert (out / f"{script}.md").read_text().startswith("# ")
    assert (out / f"{script}.png").exists() == HAS_PLOTS
    found: dict[str, Any] = json.loads((out / f"{script}.json").read_text())
    return found


@pytest.mark.usefixtures("small_calibration")
def test_offline_measures_every_cell_of_every_engine(tmp_path: Path, checkpoint: Path) -> None:
    options = ("--model", checkpoint, "--repeats", 2, "--load-repeats", 1, "--kv-tokens", 4096)
    written = run("offline", tmp_path, *options, "--dtype", "float32")
    sizes = written["workload"]["prompt_tokens"]
    assert written["workload"]["prompt_tokens_of_batch"] == {
        "1": sizes[0], "2": sum(sizes[:2]), "4": sum(sizes)
    }  # fmt: skip
    for engine in ("Halimede", "transformers"):
        samples = written["samples"][engine]
        assert {name: len(values) for name, values in samples.items()} == {
            "load_s": 1, "model_s": 1, "peak_mib": 1,
            "ttft_s": 2, "prefill_s": 2, "batch_1": 2, "batch_2": 2, "batch_4": 2,
        }  # fmt: skip
        assert all(value > 0 for values in samples.values() for value in values)
        assert samples["load_s"][0] > samples["model_s"][0]
    assert written["equal_first_tokens"]["transformers"] == 4, "greedy float32 tokens are the same"
    assert {"halimede", "torch"} <= written["engines"]["Halimede"]["versions"].keys()
    assert written["machine"]["before"]["read_gb_per_s"] > 0
    assert str(checkpoint) not in (tmp_path / "offline.md").read_text(), "paths of this machine"


@pytest.mark.usefixtures("small_calibration")
def test_prefix_cache_counts_first_and_later_requests(tmp_path: Path, checkpoint: Path) -> None:
    options = ("--model", checkpoint, "--repeats", 1, "--kv-tokens", 4096)
    written = run("prefix_cache", tmp_path, *options)
    assert [(row["engine"], row["cache"]) for row in written["rows"]] == [
        ("Halimede, cache off", False),
        ("Halimede, cache on", True),
    ]
    for row in written["rows"]:
        lengths = [len(row[name]) for name in ("first", "later", "first_turn", "second_turn")]
        assert lengths == [1, 1, 1, 1]


@pytest.mark.usefixtures("bench_modules")
def test_the_workload_is_what_the_report_says(smollm2_gguf: Path) -> None:
    from prompts import CHATS

    from halimede.engine.chat import render_chat
    from halimede.engine.loader.gguf_tokenizer import load_gguf_tokenizer

    tokenizer = load_gguf_tokenizer(smollm2_gguf)
    texts = [render_chat(tokenizer, chat) for chat in CHATS]
    lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    assert (len(lengths), sum(lengths), sum(lengths[:8])) == (32, 4719, 924)
    assert (min(lengths), max(lengths)) == (32, 396)
    assert len(set(texts)) == 32


@pytest.mark.usefixtures("bench_modules")
def test_a_worker_that_fails_is_told_with_its_traceback() -> None:
    from engine_process import EngineError, EngineProcess, EngineSpec

    spec = EngineSpec("broken", "transformers_worker.py", {"model": "./nowhere", "dtype": "float32"})
    with pytest.raises(EngineError, match=r"broken: load failed[\s\S]*nowhere"):
        EngineProcess(spec)


@pytest.mark.usefixtures("bench_modules")
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_worker_stands_still_unless_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import engine_process

    monkeypatch.setattr(engine_process, "ENGINES", tmp_path)
    protocol = BENCHMARKS / "engines" / "protocol.py"
    (tmp_path / "protocol.py").write_bytes(protocol.read_bytes())
    (tmp_path / "echo.py").write_text(
        "from protocol import Engine, serve\n"
        "class Echo(Engine):\n"
        "    def import_packages(self): pass\n"
        "    def load(self, options): print('noise'); return {'pid': __import__('os').getpid()}\n"
        "    def generate(self, prompts, max_tokens, want_ids): return prompts\n"
        "serve(Echo)\n"
    )
    process = engine_process.EngineProcess(engine_process.EngineSpec("echo", "echo.py", {}))
    try:
        pid = process.facts["pid"]
        assert _state_after_stop(pid) == "T"
        with process.awake():
            assert process.generate([[1, 2]], 1)[1] == [[1, 2]]
            assert process.peak_mib() > 1
        assert _state_after_stop(pid) == "T"
    finally:
        process.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def _state_after_stop(pid: int) -> str:
    """The state of a child that was sent SIGSTOP, once the signal has arrived."""
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


@pytest.mark.usefixtures("bench_modules")
def test_doubts_name_what_changed() -> None:
    import machine

    quiet = {
        "load_average_1min": 0.1, "read_gb_per_s": 20.0, "bf16_matmul_gflop_per_s": 300.0,
        "fp32_matmul_gflop_per_s": 100.0, "python_loop_ms": 2.0,
    }  # fmt: skip
    assert machine.doubts(quiet, quiet) == []
    (doubt,) = machine.doubts(quiet, {**quiet, "read_gb_per_s": 12.0})
    assert "read_gb_per_s" in doubt
    (doubt,) = machine.doubts({**quiet, "load_average_1min": 1.5}, quiet)
    assert "load average" in doubt
