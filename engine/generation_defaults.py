"""What a model's generation_config.json says: its end-of-sequence tokens and its sampling defaults."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from halimede.engine.loader.model_files import ModelFiles
from halimede.engine.models.config import ModelConfig
from halimede.scheduler.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# generation_config.json's names on the left. A temperature there means nothing unless it samples.
_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def default_sampling_params(generation_config: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams as the model's authors recommend them; logs what differs from the plain defaults."""
    changes = {
        ours: generation_config[theirs]
        for theirs, ours in _NAMES.items()
        if generation_config.get(theirs) is not None
    }
    if changes:
        shown = ", ".join(f"{name}={value}" for name, value in changes.items())
        logger.info(
            "sampling defaults from the model's generation_config.json: %s "
            "(generation_config='vllm' ignores it)",
            shown,
        )
    return SamplingParams(**changes)


def eos_token_ids(
    files: ModelFiles, model_config: ModelConfig, tokenizer: "PreTrainedTokenizerBase | None"
) -> frozenset[int]:
    """Tokens that end a completion: generation_config.json's, else config.json's, and the tokenizer's."""
    listed = files.generation_config.get("eos_token_id")
    if listed is None:
        found = set(model_config.eos_token_ids)
    else:
        found = set(listed) if isinstance(listed, list) else {listed}
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return frozenset(token for token in found if 0 <= token < model_config.vocab_size)
