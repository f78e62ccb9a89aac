"""Halimede: an LLM serving engine whose GPU kernels are all Triton.

Importing this package costs nothing: a public name is loaded when it is first used, so that
`halimede.scheduler` stays free of torch and `import halimede` works without a GPU, triton or the server.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halimede.engine.config import EngineConfig
    from halimede.engine.input_processor import TextPrompt, TokensPrompt
    from halimede.engine.llm import LLM
    from halimede.engine.outputs import CompletionOutput, Logprob, RequestOutput
    from halimede.engine.request_window import GenerateRequest
    from halimede.errors import (
        ConfigError,
        EngineDeadError,
        HalimedeError,
        ModelLoadError,
        RequestError,
        UnsupportedModelError,
        UnsupportedQuantizationError,
    )
    from halimede.scheduler.sampling_params import RequestOutputKind, SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "CompletionOutput": "halimede.engine.outputs",
    "ConfigError": "halimede.errors",
    "EngineConfig": "halimede.engine.config",
    "EngineDeadError": "halimede.errors",
    "GenerateRequest": "halimede.engine.request_window",
    "HalimedeError": "halimede.errors",
    "LLM": "halimede.engine.llm",
    "Logprob": "halimede.engine.outputs",
    "ModelLoadError": "halimede.errors",
    "RequestError": "halimede.errors",
    "RequestOutput": "halimede.engine.outputs",
    "RequestOutputKind": "halimede.scheduler.sampling_params",
    "SamplingParams": "halimede.scheduler.sampling_params",
    "TextPrompt": "halimede.engine.input_processor",
    "TokensPrompt": "halimede.engine.input_processor",
    "UnsupportedModelError": "halimede.errors",
    "UnsupportedQuantizationError": "halimede.errors",
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "EngineDeadError",
    "GenerateRequest",
    "HalimedeError",
    "Logprob",
    "ModelLoadError",
    "RequestError",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "TextPrompt",
    "TokensPrompt",
    "UnsupportedModelError",
    "UnsupportedQuantizationError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'halimede' has no attribute {name!r}")
    from halimede.collection import pause_collection

    with pause_collection():
        value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
