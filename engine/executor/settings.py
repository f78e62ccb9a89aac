"""What the settings left to `auto` come to for a model on a device."""

import torch

from halimede.engine.config import EngineConfig
from halimede.engine.executor.backend import resolve_attention_backend, resolve_kv_cache_dtype
from halimede.engine.executor.device import resolve_activation_dtype, resolve_dtype
from halimede.engine.models.config import ModelConfig
from halimede.engine.runner.kv_cache import check_max_model_len
from halimede.engine.runner.settings import ExecutionSettings


def resolve_settings(config: EngineConfig, model: ModelConfig, device: torch.device) -> ExecutionSettings:
    """The settings on a device that resolve_device gave, or on "meta", which stands for any GPU.

    Raises ConfigError for a dtype, length or backend that the model or the device does not have.
    """
    overflows = None if model.supports_float16 else model.architecture
    dtype = resolve_dtype(config.dtype, model.dtype, device, no_float16_for=overflows)
    max_model_len = check_max_model_len(config, model)
    attention = resolve_attention_backend(config.attention_backend, device)
    activations = resolve_activation_dtype(dtype, device)
    # Triton reads what it computes in (on a GPU the two are one), a CPU's torch path widens.
    plain = activations if attention == "triton" else dtype
    kv_cache_dtype = resolve_kv_cache_dtype(config.kv_cache_dtype, plain, attention)
    return ExecutionSettings(device, dtype, activations, kv_cache_dtype, max_model_len, attention)
