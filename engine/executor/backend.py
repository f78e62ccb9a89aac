"""Which backend runs the forward pass, and what the KV cache holds."""

import importlib.util
import logging

import torch

from halimede.engine.config import AttentionBackend, KVCacheDType
from halimede.engine.layers.attention_step import Backend
from halimede.engine.layers.attention_torch import TorchBackend
from halimede.errors import ConfigError

logger = logging.getLogger(__name__)

_CACHE_DTYPES: dict[str, torch.dtype] = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
}


def resolve_attention_backend(name: AttentionBackend, device: torch.device) -> AttentionBackend:
    """What `name` means on the device; ConfigError where it cannot run, with what to install or to choose."""
    if name == "auto":
        name = "torch" if device.type == "cpu" else "triton"
    if name == "xformers":
        if device.type == "cpu":
            raise ConfigError("attention_backend='xformers' needs a GPU; use auto or torch on a CPU")
        if importlib.util.find_spec("xformers") is None:
            raise ConfigError(
                "attention_backend='xformers' needs xformers, which is not installed: "
                "pip install 'halimede[xformers]'"
            )
    uses_triton = device.type != "cpu" or name == "triton"
    if uses_triton and importlib.util.find_spec("triton") is None:
        raise ConfigError(f"{device} needs the package triton, which is not installed: pip install triton")
    return name


def make_backend(
    name: AttentionBackend, device: torch.device, *, max_model_len: int, max_rows: int
) -> Backend:
    """The Backend of a resolved attention backend, for steps of up to max_rows sequences."""
    if device.type == "cpu" and name == "torch":
        return TorchBackend()
    from halimede.engine.layers.attention_gpu import GpuBackend, TorchAttention, TritonAttention

    if name == "torch":
        return GpuBackend(TorchAttention())
    if name == "xformers":
        from halimede.engine.layers.attention_xformers import XformersAttention

        return GpuBackend(XformersAttention())
    if device.type == "cpu":
        logger.warning(
            "attention_backend='triton' on a CPU: kernels are interpreted, thousands of times slower"
        )
    return GpuBackend(TritonAttention(max_model_len, max_rows))


def captures_graphs(backend: AttentionBackend) -> bool:
    """Whether steps on a GPU can be recorded as graphs: the others look at lengths on the host."""
    return backend == "triton"


def resolve_kv_cache_dtype(name: KVCacheDType, dtype: torch.dtype, backend: AttentionBackend) -> torch.dtype:
    """The KV cache's type, `dtype` for auto; ConfigError if the backend does not read it."""
    if name == "auto":
        return dtype
    if backend != "triton":
        raise ConfigError(
            f"kv_cache_dtype={name!r} needs attention_backend='triton' (a GPU's default), not {backend!r}; "
            "use kv_cache_dtype='auto'"
        )
    return _CACHE_DTYPES[name]
