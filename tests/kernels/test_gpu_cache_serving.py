"""A warmed cache serves: in another process, another folder, for NVIDIA and AMD, with nothing compiled."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving_scenarios import write_model
from stub_gpu import Backend

from halimede.kernels.specialise import TRITON_VERSION

HERE = Path(__file__).parent
TARGETS: dict[str, Backend] = {"sm_90": "cuda", "gfx942": "hip"}
MODEL = "llama"


def run(arguments: list[Any], **environment: str) -> str:
    """Standard output of a fresh process. Triton's own cache is elsewhere, and there is no C compiler."""
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=TARGETS)
def warmed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(target, folder with the model and, in "cache", all of its kernels for the target)."""
    folder = tmp_path_factory.mktemp(request.param)
    write_model(folder, MODEL, head_dim=16)  # small: its attention kernels are compiled in less time
    command = ["-m", "halimede.engine.cli.main", "warmup", folder / "config.json", "--target", request.param]
    settings = ["--max-num-seqs", "256", "--max-num-batched-tokens", "512", "--jobs", "1", "--json"]
    # An empty PATH: neither a C compiler nor anything of a toolkit is found.
    printed = run([*command, *settings, "-o", folder / "cache"], PATH="", CC="/nonexistent")
    result = json.loads(printed)
    assert result["compiled"] > 20
    assert (result["cached"], result["failed"]) == (0, [])
    return request.param, folder


def serve(
    warmed: tuple[str, Path], libraries: dict[Backend, Path], cache: Path, jit: str, scratch: Path
) -> dict[str, Any]:
    target, folder = warmed
    printed = run(
        [HERE / "serve_on_stub.py", folder, target, libraries[TARGETS[target]], cache, jit],
        STUB_GPU_ARCH=target.removeprefix("sm_"),
        TRITON_CACHE_DIR=str(scratch / "triton"),
        PATH="",
        CC="/nonexistent",
    )
    result: dict[str, Any] = json.loads(printed)
    return result


def test_another_process_in_another_folder_compiles_nothing(
    warmed: tuple[str, Path], stub_libraries: dict[Backend, Path], tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere" / "kernels"
    shutil.copytree(warmed[1] / "cache", moved)
    result = serve(warmed, stub_libraries, moved, "forbid", tmp_path)
    assert result["launches"] > 1000
    assert result["kernel_cache_hits_total"] == len(list(moved.glob("v1/*/*/*.json")))
    assert (result["jit_compiles_total"], result["jit_compile_seconds_total"]) == (0, 0)
    assert (result["compiled_by_triton"], result["found_by_triton"]) == (0, 0)
    assert not (tmp_path / "triton").exists()


@pytest.mark.parametrize("warmed", ["sm_90"], indirect=True)
def test_a_broken_kernel_cache_is_named_or_repaired(
    warmed: tuple[str, Path], stub_libraries: dict[Backend, Path], tmp_path: Path
) -> None:
    target, folder = warmed
    cache = tmp_path / "cache"
    shutil.copytree(folder / "cache", cache)
    manifests = {
        entry["kernel"].partition(":")[2]: (path, entry)
        for path in (cache / "v1" / TRITON_VERSION / target).glob("*.json")
        for entry in (json.loads(path.read_text()),)
    }
    _, entry = manifests["_ban_kernel"]
    (damaged,) = cache.rglob(f"{entry['sha256'][:32]}.*")
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)
    refused = serve(warmed, stub_libraries, cache, "forbid", tmp_path)
    assert refused["kind"] == "KernelCacheError"
    assert f"ban for {target}" in refused["error"]
    assert str(damaged) in refused["error"]

    gone, _ = manifests["_bias_kernel"]
    gone.unlink()
    refused = serve(warmed, stub_libraries, cache, "forbid", tmp_path)
    assert refused["kind"] == "KernelCacheError"
    assert f"the kernel cache {cache} lacks 1 of the kernels" in refused["error"]
    assert f"bias for {target}" in refused["error"]
    assert f"key {gone.stem}" in refused["error"]
    assert f"`halimede warmup {folder} --target {target} -o {cache}` builds" in refused["error"]

    made = serve(warmed, stub_libraries, cache, "allow", tmp_path)
    assert made["jit_compiles_total"] == made["compiled_by_triton"] == 2
    assert made["jit_compile_seconds_total"] > 0
    assert _files(cache) == _files(folder / "cache"), "with these the test above serves"


def _files(cache: Path) -> dict[Path, bytes]:
    return {path.relative_to(cache): path.read_bytes() for path in cache.rglob("*.*") if path.is_file()}
