"""Options of vLLM's LLM that have no counterpart here, for scripts that pass them all the same."""

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from halimede.errors import ConfigError

logger = logging.getLogger(__name__)

_NEUTRAL: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "cpu_offload_gb": (0,),
        "data_parallel_size": (1,),
        "pipeline_parallel_size": (1,),
        "tokenizer_mode": ("auto", "hf"),
    }
)
"""Options by the values that ask for what happens anyway."""

_IRRELEVANT = (
    "compilation_config",
    "disable_custom_all_reduce",
    "disable_log_stats",
    "distributed_executor_backend",
    "max_seq_len_to_capture",
    "swap_space",
)
"""Options about machinery that does not exist here; no value of theirs changes a result."""


def drop_vllm_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without those that do nothing here, and without None, which is vLLM's "the default".

    Raises ConfigError for a value that asks for something that is not supported.
    """
    kept = {}
    for name, value in options.items():
        if value is None:
            continue
        if name in _IRRELEVANT:
            logger.warning("the option %s has no effect here", name)
        elif name not in _NEUTRAL:
            kept[name] = value
        elif value not in _NEUTRAL[name]:
            supported = " or ".join(map(repr, _NEUTRAL[name]))
            raise ConfigError(f"{name}={value!r} is not supported; leave it out or use {supported}")
    return kept
