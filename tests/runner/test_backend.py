"""Which attention backend and which cache type a configuration comes to, and what it cannot have."""

import importlib.util

import pytest
import torch

from halimede.engine.executor.backend import (
    make_backend,
    resolve_attention_backend,
    resolve_kv_cache_dtype,
)
from halimede.engine.layers.attention_torch import TorchBackend
from halimede.errors import ConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16 = torch.bfloat16


def test_auto_is_triton_on_a_gpu_and_torch_on_a_cpu() -> None:
    assert resolve_attention_backend("auto", GPU) == "triton"
    assert resolve_attention_backend("auto", CPU) == "torch"
    assert resolve_attention_backend("triton", CPU) == "triton"
    assert resolve_attention_backend("torch", GPU) == "torch"


def test_xformers_needs_a_gpu_and_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"xformers.* needs a GPU; use auto"):
        resolve_attention_backend("xformers", CPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'halimede\[xformers\]'"):
        resolve_attention_backend("xformers", GPU)


def test_a_gpu_needs_triton_and_a_cpu_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for device, name in ((GPU, "auto"), (GPU, "torch"), (CPU, "triton")):
        with pytest.raises(ConfigError, match="pip install triton"):
            resolve_attention_backend(name, device)  # type: ignore[arg-type]
    assert resolve_attention_backend("auto", CPU) == "torch"


def test_backends() -> None:
    assert isinstance(make_backend("torch", CPU, max_model_len=64, max_rows=4), TorchBackend)
    assert not isinstance(make_backend("torch", GPU, max_model_len=64, max_rows=4), TorchBackend)


def test_cache_dtypes() -> None:
    assert resolve_kv_cache_dtype("auto", BF16, "triton") == BF16
    assert resolve_kv_cache_dtype("auto", BF16, "torch") == BF16
    assert resolve_kv_cache_dtype("fp8", BF16, "triton") == torch.float8_e4m3fn
    assert resolve_kv_cache_dtype("fp8_e4m3", BF16, "triton") == torch.float8_e4m3fn
    assert resolve_kv_cache_dtype("int8", BF16, "triton") == torch.int8


@pytest.mark.parametrize("backend", ["torch", "xformers"])
@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_other_backends_read_the_models_type_only(name: str, backend: str) -> None:
    with pytest.raises(ConfigError, match=f"kv_cache_dtype='{name}' needs attention_backend='triton'"):
        resolve_kv_cache_dtype(name, BF16, backend)  # type: ignore[arg-type]
