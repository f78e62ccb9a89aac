"""What a model's generation_config.json says: its end-of-sequence tokens and its sampling defaults."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from halimede.engine.loader.model_files import ModelFiles
from halimede.engine.models.config import ModelConfig
from halimede.errors import ModelLoadError, RequestError
from halimede.scheduler.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# generation_config.json's names on the left.
_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def default_sampling_params(generation_config: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams as the model's authors recommend them; logs what differs from the plain defaults.

    Like vLLM it takes no notice of do_sample. Raises ModelLoadError for values that are not valid.
    """
    changes = {
        ours: generation_config[theirs]
        for theirs, ours in _NAMES.items()
        if generation_config.get(theirs) is not None
    }
    try:
        params = SamplingParams(**changes)
    except RequestError as error:
        raise ModelLoadError(
            f"the model's generation_config.json has sampling defaults that are not valid: {error}; correct "
            "the file, or set generation_config='vllm' to ignore it"
        ) from error
    if changes:
        shown = ", ".join(f"{name}={value}" for name, value in changes.items())
        logger.info(
            "sampling defaults from the model's generation_config.json: %s "
            "(generation_config='vllm' ignores it)",
            shown,
        )
    return params


def eos_token_ids(
    files: ModelFiles, model_config: ModelConfig, tokenizer: "PreTrainedTokenizerBase | None"
) -> frozenset[int]:
    """Tokens that end a completion: generation_config.json's, else config.json's, and the tokenizer's.

    Raises ModelLoadError if generation_config.json names something else than token ids.
    """
    listed = files.generation_config.get("eos_token_id")
    found = list(model_config.eos_token_ids)
    if listed is not None:
        found = listed if isinstance(listed, list) else [listed]
    if not all(isinstance(token, int) for token in found):
        raise ModelLoadError(
            f"the model's generation_config.json has eos_token_id={listed!r}, which must be a token id or a "
            "list of them; correct the file"
        )
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found = [*found, tokenizer.eos_token_id]
    return frozenset(token for token in found if 0 <= token < model_config.vocab_size)
