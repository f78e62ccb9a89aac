"""`halimede warmup`: what it says, what it builds, and that it goes on after anything that stops it."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import write_tiny_checkpoint

from halimede import EngineConfig
from halimede.engine.build import open_model
from halimede.engine.cli import warmup as warmup_module
from halimede.engine.cli.main import main
from halimede.engine.cli.warmup_progress import Progress
from halimede.engine.warmup import command, pool
from halimede.engine.warmup.command import warmup_command
from halimede.engine.warmup.pool import Outcome
from halimede.kernels.specialise import Specialisation
from halimede.kernels.store import KernelStore
from halimede.kernels.target import TARGETS

CHEAP = ("_rms_norm_kernel", "_embed_kernel", "_bias_kernel")
SLOW = ("_attention_decode_kernel", "_prefill_kernel", "_threshold_kernel", "_logprobs_kernel")
# `halimede`, with a warm-up that leaves the kernels out that take a second and more to compile.
PROGRAM = f"""
from halimede.engine.cli import warmup
from halimede.engine.cli.main import main
if __name__ == "__main__":
    every = warmup._specialisations
    warmup._specialisations = lambda *args: [one for one in every(*args) if not one.name.endswith({SLOW})]
    main()
"""
Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that ends with `status`; what it printed, errors last."""

    def run(*arguments: object, status: int = 0) -> str:
        with pytest.raises(SystemExit) as end:
            main(["warmup", *map(str, arguments)])
        printed = capsys.readouterr()
        assert end.value.code == status, printed
        return printed.out + printed.err

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a config.json, no weights and no tokenizer."""
    whole = write_tiny_checkpoint(tmp_path_factory.mktemp("whole"))
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_bytes((whole / "config.json").read_bytes())
    return folder


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> list[Specialisation]:
    """Only a few kernels are built, and these are they."""
    found: list[Specialisation] = []
    original = warmup_module._specialisations

    def few(*arguments: Any) -> list[Specialisation]:
        found[:] = [one for one in original(*arguments) if one.name.endswith(CHEAP)]
        return found

    monkeypatch.setattr(warmup_module, "_specialisations", few)
    return found


def test_a_model_may_be_given_in_several_ways(
    model: Path, wanted: list[Specialisation], run: Run, tmp_path: Path
) -> None:
    to = ("--target", "sm_90", "-o", tmp_path / "cache", "-j", 1)
    said = run(model, *to)
    keys = {one.key for one in wanted}
    assert len(keys) >= 4
    assert said.startswith(f"{len(keys)} compiled, 0 cached, 0 failed in ")
    assert f" for sm_90 in {tmp_path / 'cache'}\n" in said
    assert said.endswith(f"\ncompiling {len(keys)} kernels\n")
    said = run(model / "config.json", *to, "--json")
    assert {one.key for one in wanted} == keys
    found = json.loads(said)
    assert found.pop("seconds") < 5
    size = sum(entry.size for entry in KernelStore(tmp_path / "cache").entries())
    assert found == {
        "folder": str(tmp_path / "cache"),
        "targets": ["sm_90"],
        "compiled": 0,
        "cached": len(keys),
        "failed": [],
        "bytes": size,
    }
    said = run(model, "--target", "sm_90", "--kernel-cache-dir", tmp_path / "cache")
    assert said.startswith(f"0 compiled, {len(keys)} cached, 0 failed in ")


def test_a_gguf_is_a_model_too(
    smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path
) -> None:
    calls: list[list[str]] = []

    def build_all(specialisations: list[Specialisation], *_: Any, **__: Any) -> pool.Summary:
        calls.append([one.key for one in specialisations])
        return pool.Summary(cached=len(specialisations))

    monkeypatch.setattr(pool, "build_all", build_all)
    run(smollm2_gguf, "--target", "sm_90,gfx942")
    files, _ = open_model(EngineConfig(model=str(smollm2_gguf)))
    (tmp_path / "config.json").write_text(json.dumps(files.config))
    run(tmp_path, "--target", "sm_90,gfx942")
    run(tmp_path / "config.json", "--target", "sm_90, gfx942,sm_90")
    assert calls[0] == calls[1] == calls[2]
    assert len(calls[0]) > 40


def test_wrong_usage(model: Path, run: Run, tmp_path: Path) -> None:
    targets = ", ".join(TARGETS)
    for arguments, status, said in (
        (
            (model,),
            1,
            "error: there is no GPU here whose target could be taken; name targets: --target sm_90,gfx942, "
            f"or all. There are: {targets}\n",
        ),
        ((model, "-t", "sm90x"), 1, f"error: target 'sm90x' is unknown; use one of: {targets}\n"),
        (
            (model, "-t", "gfx803"),
            1,
            f"error: no kernels for hip GPUs of type gfx803; they exist for: {targets}\n",
        ),
        ((model, "-t", ","), 1, f"error: ',' names no target; use auto, all or some of: {targets}\n"),
        ((model, "-t", "sm_90,auto"), 1, f"error: target 'auto' is unknown; use one of: {targets}\n"),
        (
            (tmp_path / "absent", "-t", "sm_90"),
            1,
            f"error: {tmp_path / 'absent'} does not exist (looked in {Path.cwd()}); check the path, or give "
            "a Hugging Face id like owner/name\n",
        ),
        (
            (model, "-t", "sm_90", "--block-size", "17"),
            1,
            "error: block_size=17 is not one of: 16, 32, 64, 128\n",
        ),
        ((model, "-t", "sm_90", "--no-such-flag"), 2, "No such option: --no-such-flag"),
        ((model, "-t", "sm_90", "-j", "0"), 2, "Invalid value for '--jobs'"),
        (
            (model, "-t", "sm_90", "-o", "a", "--kernel-cache-dir", "b"),
            2,
            "Invalid value: -o a contradicts --kernel-cache-dir b; leave one of them out\n",
        ),
    ):
        printed = run(*arguments, status=status)
        if status == 1:
            assert printed == said
        else:
            assert said in printed


def test_obstacles_are_one_line(model: Path, wanted: list[Specialisation], run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = run(model, "-t", "sm_90", "-o", tmp_path / "file", status=1)
    assert said.startswith(f"error: the kernel cache {tmp_path / 'file'} cannot be written (")
    assert said.endswith(f"run again: 0 of {len(wanted)} kernels are there and are kept\n")
    assert said.count("\n") == 1


def test_without_triton_the_remedy_is_told(model: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "halimede.engine.warmup.pool", None)
    assert "pip install triton" in run(model, "-t", "sm_90", status=1)


def test_failures_are_told(
    model: Path,
    wanted: list[Specialisation],
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build_all(specialisations: list[Specialisation], *_: Any, **__: Any) -> pool.Summary:
        return pool.Summary(failed=[(one, "the compiler says no") for one in specialisations] * 6)

    monkeypatch.setattr(pool, "build_all", build_all)
    said = run(model, "-t", "sm_90", status=1)
    number = 6 * len(wanted)
    assert f"0 compiled, 0 cached, {number} failed" in said
    lines = said.splitlines()[1:]
    assert len(lines) == 21
    assert lines[0].startswith("failed: ")
    assert lines[0].endswith(f"(key {wanted[0].key}): the compiler says no")
    assert lines[20] == f"... and {number - 20} more; --json lists all"
    found = json.loads(run(model, "-t", "sm_90", "--json", status=1))
    assert len(found["failed"]) == number
    assert found["failed"][0] == {
        "kernel": wanted[0].name,
        "target": "sm_90",
        "key": wanted[0].key,
        "error": "the compiler says no",
    }


def test_ctrl_c_says_what_is_kept(
    model: Path,
    wanted: list[Specialisation],
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build_all(ones: list[Specialisation], *_: Any, on_start: Any, on_done: Any, **__: Any) -> None:
        on_start(ones[1:])
        on_done(Outcome(ones[1], 100, None, 0.5))
        on_done(Outcome(ones[2], 0, "no", 0.5))
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "build_all", build_all)
    said = run(model, "-t", "sm_90", "-o", tmp_path, status=130)
    assert said.splitlines()[:2] == [
        f"compiling {len(wanted) - 1} kernels",
        f"interrupted: 2 of {len(wanted)} kernels are in {tmp_path}; the same command goes on from there",
    ]


def test_the_bar_tells_the_time_that_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    slow: Any = SimpleNamespace(name="halimede.kernels.gpu.attention:_prefill_kernel")
    quick: Any = SimpleNamespace(name="halimede.kernels.gpu.norm:_rms_norm_kernel")
    with Progress(jobs=2) as progress:
        assert progress.missing is None
        progress.start([slow, slow, *[quick] * 8])
        progress.advance(Outcome(slow, 1, None, seconds=60.0))  # so others take 10
        progress.advance(Outcome(slow, 0, "the compiler says no"))
        assert progress.missing == 9
        for _ in range(8):
            progress.advance(Outcome(quick, 1, None, seconds=10.0))
    drawn = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line.strip()]
    assert drawn[0].startswith("Compiling kernels 0/10 |")
    assert any(line.startswith("Compiling kernels 1/10 |") and "about 01:11 left" in line for line in drawn)
    assert drawn[-1].startswith("Compiling kernels 10/10 |")
    assert "left" not in drawn[-1]
    assert max(map(len, drawn)) <= 60
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with Progress(jobs=2) as progress:
        progress.start([])
        progress.close()
    assert capsys.readouterr().err == ""


# All that changes a kernel, or where the model is found: another value than the default.
CHANGED: dict[str, Any] = {
    "revision": "main",
    "download_dir": "some where",
    "hf_overrides": {"rope_parameters": {"rope_theta": 7.0}, "name": "it's"},
    "dtype": "float16",
    "quantization": "int8",
    "attention_backend": "triton",
    "kv_cache_dtype": "int8",
    "max_model_len": 64,
    "max_num_seqs": 3,
    "max_num_batched_tokens": 512,
    "block_size": 32,
    "enable_chunked_prefill": False,
    "max_logprobs": -1,
}
# This has one value only, so far.
FIXED = {"tensor_parallel_size"}


@pytest.mark.parametrize("name", ["everything", *CHANGED])
def test_the_command_that_is_named_has_every_setting(
    name: str, model: Path, monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path
) -> None:
    asked: list[tuple[EngineConfig, list[str]]] = []

    def note(config: EngineConfig, targets: list[Any]) -> list[Specialisation]:
        asked.append((config, [target.machine for target in targets]))
        return []

    monkeypatch.setattr(warmup_module, "_specialisations", note)
    settings = CHANGED if name == "everything" else {name: CHANGED[name]}
    if name == "revision":  # as it is printed where nobody asked for a folder
        settings = {**settings, "jit": "forbid", "seed": 3, "gpu_memory_utilization": 0.5}
    config = EngineConfig(model=str(model), **settings)
    cache = tmp_path / "a folder"
    words = shlex.split(warmup_command(config, "sm_103", cache))
    assert words[:2] == ["halimede", "warmup"]
    run(*words[2:])
    ((parsed, targets),) = asked
    assert targets == ["sm_103"]
    expected = {"model": str(model), "load_format": "dummy", "kernel_cache_dir": str(cache), **settings}
    for field in fields(EngineConfig):
        if field.name not in ("jit", "seed", "gpu_memory_utilization"):
            assert getattr(parsed, field.name) == expected.get(field.name, field.default), field.name


def test_no_setting_is_forgotten_in_the_command() -> None:
    names = {field.name for field in fields(EngineConfig)}
    assert names == {*command._LEFT_OUT, *CHANGED, *FIXED}
    assert not command._LEFT_OUT & CHANGED.keys()


def test_what_no_command_line_can_say(tmp_path: Path) -> None:
    overrides = {"dtype": torch.bfloat16}
    said = warmup_command(EngineConfig(model="m", hf_overrides=overrides), "sm_90", tmp_path)
    assert """--hf-overrides '{"dtype": "bfloat16"}'""" in said
    said = warmup_command(EngineConfig(model="m", hf_overrides=lambda config: config), "sm_90", tmp_path)
    assert "--hf-overrides ... --target" in said
    said = warmup_command(EngineConfig(model="m", load_format="gguf"), "sm_90", tmp_path)
    assert "--load-format gguf" in said
    assert "load-format" not in warmup_command(EngineConfig(model="m", load_format="pt"), "sm_90", tmp_path)


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listed.split()]


def is_alive(pid: int) -> bool:
    """Not of those that have ended and that nobody has waited for, which may take a minute."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_a_run_that_is_killed_goes_on(
    model: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of a model's kernels, with two processes."""
    every = warmup_module._specialisations
    monkeypatch.setattr(
        warmup_module,
        "_specialisations",
        lambda *args: [one for one in every(*args) if not one.name.endswith(SLOW)],
    )
    store = KernelStore(tmp_path / "cache")
    arguments = ("warmup", str(model), "--target", "sm_90", "-o", str(store.folder), "-j", "2")
    (tmp_path / "tmp").mkdir()
    parent = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while len(list(store.entries())) < 3:
        assert time.monotonic() < deadline
        assert parent.poll() is None, parent.communicate()
        time.sleep(0.05)
    processes = children(parent.pid)
    assert len(processes) >= 2
    parent.send_signal(signal.SIGKILL)
    parent.communicate(timeout=30)
    while any(map(is_alive, processes)) or any((tmp_path / "tmp").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not [problem for problem in store.verify() if not problem.leftover]
    kept = len(list(store.entries()))
    found = json.loads(run(*arguments[1:], "--json").partition("\ncompiling")[0])
    assert found["cached"] == kept
    assert found["compiled"] > 10
    assert found["failed"] == []
    assert len(list(store.entries())) == found["cached"] + found["compiled"]
    assert not [problem for problem in store.verify() if not problem.leftover]
