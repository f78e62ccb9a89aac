"""Where the kernels of an engine come from, under each `jit`, and what it says when they are not there."""

import errno
import logging
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from cheap_kernels import cheap, four
from tiny_models import write_tiny_checkpoint

from halimede import EngineConfig
from halimede.engine.build import open_model
from halimede.engine.cli import warmup as warmup_module
from halimede.engine.cli.main import main
from halimede.engine.executor.settings import resolve_settings
from halimede.engine.warmup import serving
from halimede.engine.warmup.serving import ServingKernels, open_serving_kernels
from halimede.errors import KernelCacheError, KernelError
from halimede.kernels.library import KernelLibrary, describe
from halimede.kernels.specialise import TRITON_VERSION, Specialisation
from halimede.kernels.store import KernelStore
from halimede.kernels.target import find_target

CHEAP = ("_rms_norm_kernel", "_embed_kernel", "_bias_kernel")
LIBRARY = "halimede.kernels.library"


def open_(folder: Path, cache: Path, target: str = "sm_90", **settings: Any) -> ServingKernels:
    """As build_core opens them, for a GPU that is not there."""
    config = EngineConfig(model=str(folder), kernel_cache_dir=str(cache), **settings)
    _, model_config = open_model(config)
    on_gpu = resolve_settings(config, model_config, torch.device("meta"))
    return open_serving_kernels(config, model_config, on_gpu, find_target(target))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "the model")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up and serving know of a few kernels only."""
    serving_all, warmup_all = serving.serving_specialisations, warmup_module._specialisations

    def cheap_ones(found: list[Specialisation]) -> list[Specialisation]:
        return [one for one in found if one.name.endswith(CHEAP)]

    monkeypatch.setattr(serving, "serving_specialisations", lambda *args: cheap_ones(serving_all(*args)))
    monkeypatch.setattr(warmup_module, "_specialisations", lambda *args: cheap_ones(warmup_all(*args)))


def test_forbid_names_all_that_is_missing_and_the_command(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    needed = open_(model, cache, dtype="float16", max_num_seqs=3)._specialisations
    assert len(needed) > 20
    with pytest.raises(KernelCacheError) as error:
        open_(model, cache, dtype="float16", jit="forbid", max_num_seqs=3)
    command = f"halimede warmup '{model}' --dtype float16 --max-num-seqs 3 --target sm_90 -o {cache}"
    assert str(error.value).splitlines() == [
        f"jit='forbid', and the kernel cache {cache} lacks {len(needed)} of the kernels that may be needed; "
        f"`{command}` builds them. They are:",
        *(f"  {describe(one)}" for one in needed),
    ]
    assert not cache.exists()


@pytest.mark.usefixtures("few")
def test_the_command_that_it_names_builds_them(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    settings = {
        "dtype": "float16",
        "kv_cache_dtype": "int8",
        "max_num_seqs": 5,
        "hf_overrides": {"head_dim": 64},
    }
    with pytest.raises(KernelCacheError) as error:
        open_(model, cache, jit="forbid", **settings)
    command = re.search(r"`halimede (.*?)`", str(error.value))
    assert command is not None
    with pytest.raises(SystemExit) as end:
        main([*shlex.split(command[1]), "-j", "1"])
    assert end.value.code == 0
    kernels = open_(model, cache, jit="forbid", **settings)
    for one in kernels._specialisations:
        kernels.library.find(one)
    counters = kernels.library.counters
    assert (counters.jit_compiles_total, counters.kernel_cache_hits_total) == (
        0,
        len(kernels._specialisations),
    )


def test_a_corrupt_kernel_under_forbid_names_its_file(tmp_path: Path) -> None:
    store, one = KernelStore(tmp_path), cheap()
    KernelLibrary(store).find(one)
    found = store.read(TRITON_VERSION, "sm_90", one.key)
    assert found is not None
    path = store.root / TRITON_VERSION / "sm_90" / found[0].binary_name
    path.write_bytes(path.read_bytes()[:-1])
    library = KernelLibrary(store, "forbid", remedy="`this`")
    library.require([one])  # contents are read when they are loaded
    with pytest.raises(KernelCacheError) as error:
        library.find(one)
    assert f"the kernel cache does not give {describe(one)}: {path} has" in str(error.value)
    assert "`this` builds it again" in str(error.value)
    with pytest.raises(KernelCacheError, match=r"does not have scale .*; `this` builds it"):
        library.find(cheap(scale=3.0))
    assert library.counters.jit_compiles_total == library.counters.kernel_cache_hits_total == 0
    again = KernelLibrary(store)
    assert again.find(one) == found
    assert (again.counters.jit_compiles_total, again.counters.kernel_cache_hits_total) == (1, 0)
    assert again.counters.jit_compile_seconds_total > 0
    library.find(one)


@pytest.mark.parametrize("jit", ["allow", "warn"])
def test_a_compile_is_counted_and_under_warn_told(
    jit: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LIBRARY)
    library = KernelLibrary(KernelStore(tmp_path), jit)
    ones = [cheap(), cheap(bias=True)]
    library.require(ones)
    for one in (*ones, *ones):
        library.find(one)
    warned = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    told = [f"compiling {describe(one)}: it is not in the kernel cache" for one in ones]
    assert warned == (told if jit == "warn" else [])
    assert [r.getMessage() for r in caplog.records] == told
    assert (library.counters.jit_compiles_total, library.counters.kernel_cache_hits_total) == (2, 2)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_cache_that_cannot_be_written_is_told_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def write(self: KernelStore, *_: Any) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(KernelStore, "write", write)
    library = KernelLibrary(KernelStore(tmp_path))
    entries = [library.find(one)[0].key for one in (cheap(), cheap(bias=True))]
    assert entries == [cheap().key, cheap(bias=True).key]
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert f"the kernel cache {tmp_path} cannot be written ([Errno {number}] no)" in warning
    assert library.counters.jit_compiles_total == 2


class _Device:
    """As DeviceKernels; `missing` are not in its cache."""

    def __init__(self, missing: list[Specialisation], error: BaseException | None = None) -> None:
        self.missing, self.error = missing, error
        self.asked: list[Specialisation] = []

    def preload(self, specialisations: Any) -> list[Specialisation]:
        self.asked = list(specialisations)
        if self.error is not None:
            raise self.error
        return self.missing


def test_what_is_loaded_and_what_will_be_compiled_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "halimede.engine.warmup.serving")
    kernels = ServingKernels(KernelLibrary(KernelStore(tmp_path), remedy="`this`"), four())
    device: Any = _Device(four()[:1])
    with kernels.loading_on(device):
        pass
    assert [one.key for one in device.asked] == [one.key for one in four()]
    loaded, missing = (record.getMessage() for record in caplog.records)
    assert loaded.startswith("3 kernels loaded from the cache in ")
    assert missing == (
        f"1 of 4 kernels are not in the kernel cache {tmp_path} and will be compiled when they are first "
        "needed; `this` builds them beforehand"
    )


def test_an_error_while_loading_reaches_the_caller(tmp_path: Path) -> None:
    kernels = ServingKernels(KernelLibrary(KernelStore(tmp_path)), four())
    device: Any = _Device([], KernelError("the device does not take it"))
    done = []
    with pytest.raises(KernelError, match="does not take it"), kernels.loading_on(device):
        done.append(1)  # weights are loaded meanwhile
    assert done == [1]
    with pytest.raises(ValueError, match="weights"), kernels.loading_on(device):
        raise ValueError("of the weights goes first")
