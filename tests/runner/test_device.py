"""Which device and data type a configuration means."""

from pathlib import Path

import pytest
import torch

from halimede.engine.executor import device as device_module
from halimede.engine.executor.device import (
    cpu_has_bfloat16,
    resolve_activation_dtype,
    resolve_device,
    resolve_dtype,
)
from halimede.errors import ConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_devices_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == resolve_device("cpu:0") == CPU
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match=f"device='{name}' is not available"):
            resolve_device(name)


def test_devices_with_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == resolve_device("cuda") == GPU
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="sees 2 GPUs"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("name", ["", "gpu", "cuda:x", "cpu:-2", "mps", "meta", "🙂"])
def test_bad_devices(name: str) -> None:
    with pytest.raises(ConfigError, match="device="):
        resolve_device(name)


@pytest.mark.parametrize(
    ("native", "checkpoint", "expected"),
    [
        (True, torch.bfloat16, torch.bfloat16),
        (True, torch.float16, torch.bfloat16),
        (True, torch.float32, torch.float32),
        (True, None, torch.bfloat16),
        (False, torch.bfloat16, torch.bfloat16),
        (False, torch.float16, torch.float16),
        (False, torch.float32, torch.float32),
        (False, None, torch.bfloat16),
    ],
)
def test_auto_dtype_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, native: bool, checkpoint: torch.dtype | None, expected: torch.dtype
) -> None:
    monkeypatch.setattr(device_module, "cpu_has_bfloat16", lambda: native)
    assert resolve_dtype("auto", checkpoint, CPU) == expected
    if expected == torch.float16:
        assert resolve_dtype("auto", checkpoint, CPU, no_float16_for="G") == torch.bfloat16


def test_what_a_dtype_is_computed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, computed in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(device_module, "cpu_has_bfloat16", lambda native=native: native)
        assert resolve_activation_dtype(torch.bfloat16, CPU) == computed
        assert resolve_activation_dtype(torch.float16, CPU) == torch.float32
        assert resolve_activation_dtype(torch.float32, CPU) == torch.float32
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert resolve_activation_dtype(dtype, GPU) == dtype


@pytest.mark.parametrize(
    ("capability", "checkpoint", "expected"),
    [
        ((9, 0), torch.bfloat16, torch.bfloat16),
        ((9, 0), torch.float16, torch.float16),
        ((9, 0), torch.float32, torch.bfloat16),
        ((9, 0), None, torch.bfloat16),
        ((7, 5), torch.bfloat16, torch.float16),
        ((7, 5), torch.float32, torch.float16),
    ],
)
def test_auto_dtype_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    checkpoint: torch.dtype | None,
    expected: torch.dtype,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_dtype("auto", checkpoint, GPU) == expected


def test_explicit_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_dtype("float16", torch.bfloat16, CPU) == torch.float16
    assert resolve_dtype("bfloat16", torch.float32, CPU) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert resolve_dtype("float32", torch.bfloat16, GPU) == torch.float32
    with pytest.raises(ConfigError, match="dtype='bfloat16'"):
        resolve_dtype("bfloat16", torch.bfloat16, GPU)


def test_models_that_overflow_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for device in (CPU, GPU):
        with pytest.raises(ConfigError, match=r"dtype='float16'.*of Gemma3ForCausalLM pass 65504.*bfloat16"):
            resolve_dtype("float16", torch.float16, device, no_float16_for="Gemma3ForCausalLM")
    for capability, expected in (((9, 0), torch.bfloat16), ((7, 5), torch.float32)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        for checkpoint in (torch.float16, torch.bfloat16, torch.float32, None):
            assert resolve_dtype("auto", checkpoint, GPU, no_float16_for="G") == expected
    assert resolve_dtype("bfloat16", torch.float16, CPU, no_float16_for="G") == torch.bfloat16


def test_cpu_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, probe, raising=False)
    cpuinfo = tmp_path / "cpuinfo"
    for text, expected in (
        ("model name : x\nflags\t: sse avx512f avx512_bf16\n", True),
        ("flags\t: sse avx512f amx_bf16_not\n", False),
        ("Features\t: fp asimd bf16\n", True),
        ("", False),
    ):
        cpuinfo.write_text(text)
        assert cpu_has_bfloat16(cpuinfo) is expected
    assert cpu_has_bfloat16(tmp_path / "none") is False
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert cpu_has_bfloat16(tmp_path / "none") is True
