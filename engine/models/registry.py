"""Which architectures there are, by the name that a checkpoint's config.json gives.

To add a dense decoder of this kind: write one small file beside llama.py with a subclass of CausalLM that
says what is special (`read_options`; override a method where the computation differs), and add one line to
SUPPORTED_ARCHITECTURES. tests/models holds every registered architecture against transformers.
"""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

from halimede.errors import UnsupportedModelError

if TYPE_CHECKING:
    from halimede.engine.models.base import CausalLM
    from halimede.engine.models.config import ModelConfig

SUPPORTED_ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        "Gemma3ForCausalLM": "halimede.engine.models.gemma3:Gemma3ForCausalLM",
        "Gemma3ForConditionalGeneration": "halimede.engine.models.gemma3:Gemma3ForConditionalGeneration",
        "LlamaForCausalLM": "halimede.engine.models.llama:LlamaForCausalLM",
        "MistralForCausalLM": "halimede.engine.models.mistral:MistralForCausalLM",
        "Qwen2ForCausalLM": "halimede.engine.models.qwen2:Qwen2ForCausalLM",
        "Qwen3ForCausalLM": "halimede.engine.models.qwen3:Qwen3ForCausalLM",
    }
)
"""Architecture to "module:class"; the module is imported when the architecture is first needed."""


def model_class(architecture: str) -> "type[CausalLM]":
    """The class of an architecture. Raises UnsupportedModelError, naming those that are supported."""
    path = SUPPORTED_ARCHITECTURES.get(architecture)
    if path is None:
        raise UnsupportedModelError(
            f"architecture {architecture!r} is not supported; "
            f"supported: {', '.join(sorted(SUPPORTED_ARCHITECTURES))}"
        )
    module, _, name = path.partition(":")
    found: type[CausalLM] = getattr(import_module(module), name)
    return found


def build_model(config: "ModelConfig") -> "CausalLM":
    """The model of `config` with its parameters on the meta device: shapes without memory.

    Then: load_weights, then CausalLM.prepare.
    """
    import torch  # not above: what is supported can be listed without it

    with torch.device("meta"):
        return model_class(config.architecture)(config)
