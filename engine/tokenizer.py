"""Text to tokens and back. The tokenizers are transformers'; here they are found, loaded and streamed."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from halimede.collection import pause_collection
from halimede.engine.config import EngineConfig
from halimede.engine.loader.model_files import ModelFiles
from halimede.errors import ModelLoadError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"
# Prompt tokens that precede the first generated one: enough for a decoder to know whether a space is due.
_CONTEXT_TOKENS = 6
# A character is at most 4 bytes, so a much longer undecodable run is not waiting for anything.
_MAX_PENDING_TOKENS = 64


def load_tokenizer(config: EngineConfig, files: ModelFiles) -> "PreTrainedTokenizerBase":
    """The model's tokenizer, or the one that `config.tokenizer` names. ModelLoadError if there is none."""
    if config.tokenizer is None and files.tokenizer_path is None:
        raise ModelLoadError(
            f"{files.reference} has no tokenizer files; pass tokenizer=... (a directory, a .gguf file or a "
            "Hugging Face id), or skip_tokenizer_init=True to work with token ids"
        )
    source = config.tokenizer if config.tokenizer is not None else str(files.tokenizer_path)
    if source.startswith("~"):
        source = os.path.expanduser(source)
    with pause_collection():
        if source.endswith(".gguf"):
            from halimede.engine.loader.gguf_tokenizer import load_gguf_tokenizer

            return load_gguf_tokenizer(Path(source))
        from halimede.engine.loader.hf_tokenizer import load_hf_tokenizer

        return load_hf_tokenizer(source, config)


class IncrementalDetokenizer:
    """Turns a stream of tokens into text, each character as soon as it is certain.

    A token alone often has no text of its own (part of a character, a space that depends on what comes
    before), so a short window is decoded with and without the new tokens and the difference is the text.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[int], *, skip_special_tokens: bool
    ) -> None:
        self._decode = _decoder(tokenizer, skip_special_tokens=skip_special_tokens)
        self._context = list(prompt[-_CONTEXT_TOKENS:])
        self._context_length: int | None = None  # characters, once they are needed
        self._pending: list[int] = []
        self._shown = 0  # characters of the pending text that have been given out

    def add(self, token_id: int) -> str:
        """The text that is certain once this token is known; may be empty."""
        self._pending.append(token_id)
        text = self._pending_text()
        if not text:
            self._pending.clear()  # a special token that is left out
            return ""
        # Replacement characters at the end may be the first bytes of a character that goes on.
        certain = text.rstrip(_REPLACEMENT)
        if certain == text or len(self._pending) >= _MAX_PENDING_TOKENS:
            return self._give_all(text)
        piece, self._shown = certain[self._shown :], max(self._shown, len(certain))
        return piece

    def flush(self) -> str:
        """What is left when the stream ends: an unfinished character, as the replacement character."""
        return self._give_all(self._pending_text()) if self._pending else ""

    def _give_all(self, text: str) -> str:
        piece = text[self._shown :]
        self._context, self._context_length = self._pending, None
        self._pending, self._shown = [], 0
        return piece

    def _pending_text(self) -> str:
        if self._context_length is None:
            self._context_length = len(self._decode(self._context))
        return self._decode(self._context + self._pending)[self._context_length :]


def _decoder(
    tokenizer: "PreTrainedTokenizerBase", *, skip_special_tokens: bool
) -> Callable[[list[int]], str]:
    """tokenizer.decode with these settings, without what it does for other kinds of arguments."""
    from transformers import PreTrainedTokenizerFast as Fast

    if isinstance(tokenizer, Fast) and (type(tokenizer).decode, type(tokenizer)._decode) == (
        Fast.decode,
        Fast._decode,
    ):
        # Its own code, six times faster than through it; a class that changes how to decode keeps its way.
        return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=skip_special_tokens)
    decode = cast("Callable[..., str]", tokenizer.decode)
    return partial(decode, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
