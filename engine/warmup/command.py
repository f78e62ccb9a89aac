"""The command that builds what an engine needs."""

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halimede.engine.config import EngineConfig

# What cannot change which kernels there are, or must not be repeated.
_LEFT_OUT = frozenset(
    {
        "model",
        "tokenizer",
        "skip_tokenizer_init",
        "tokenizer_revision",
        "hf_token",
        "trust_remote_code",
        "load_format",
        "device",
        "enforce_eager",
        "lazy_graph_capture",
        "async_scheduling",
        "profile",
        "seed",
        "enable_prefix_caching",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "num_gpu_blocks_override",
        "scheduling_policy",
        "generation_config",
        "chat_template",
        "jit",
        "kernel_cache_dir",
    }
)


def warmup_command(config: EngineConfig, target: str, folder: Path) -> str:
    """The `halimede warmup` that builds all that an engine of this config needs on a target, in a folder."""
    words = ["halimede", "warmup", config.model]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in _LEFT_OUT and value != field.default:
            words += _option(field.name, value)
    if config.load_format == "gguf":  # else the settings are those of config.json, without any weights
        words += _option("load_format", "gguf")
    return shlex.join([*words, "--target", target, "-o", str(folder)])


def _option(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if callable(value):  # a function cannot be written on a command line
        return [f"--{flag}", "..."]
    return [f"--{flag}", json.dumps(value, default=_name) if isinstance(value, Mapping) else str(value)]


def _name(value: Any) -> str:
    """Of what JSON does not have, such as a dtype of torch."""
    return str(value).removeprefix("torch.")
