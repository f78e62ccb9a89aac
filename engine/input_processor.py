"""Prompts and sampling parameters in, checked requests out. Everything a user can get wrong is caught here,
before anything runs.
"""

import operator
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from halimede.errors import RequestError
from halimede.scheduler.request import Request
from halimede.scheduler.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextPrompt(TypedDict):
    """A prompt as text. Requests share cached prefixes only if their cache_salts are equal."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt as token ids; `prompt`, its text, is only shown in the output."""

    prompt_token_ids: Sequence[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


Prompt = str | TextPrompt | TokensPrompt | Mapping[str, Any] | Sequence[int]
"""Text, a dict with `prompt` or `prompt_token_ids`, or a list of token ids."""

_PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


@dataclass(frozen=True, slots=True)
class ProcessedRequest:
    """One prompt ready to run: `requests` holds one entry per completion."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    sampling_params: SamplingParams
    requests: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class InputLimits:
    """What a request must fit: token ids below vocab_size, at most max_model_len tokens in all."""

    vocab_size: int
    max_model_len: int
    max_logprobs: int


class InputProcessor:
    """Tokenizes and checks prompts. Draws a seed for each request that has none (from the engine's seed)."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase | None",
        eos_token_ids: frozenset[int],
        limits: InputLimits,
        seed: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._limits = limits
        self._random = random.Random(seed)

    def process(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        add_special_tokens: bool = True,
    ) -> ProcessedRequest:
        """One prompt as n requests. RequestError for whatever is wrong with it."""
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise RequestError(f"priority={priority!r} must be an integer (lower runs first)")
        text, token_ids, salt = self._parse(prompt, add_special_tokens)
        self._check_prompt(token_ids)
        params = self._check_params(params.replace())  # checked again: fields may have been changed
        bad_words = self._bad_words(params.bad_words or ())
        seed = params.seed if params.seed is not None else self._random.getrandbits(63)
        arrival_time = time.monotonic()
        requests = tuple(
            Request(
                request_id=request_id if params.n == 1 else f"{request_id}/{index}",
                prompt_token_ids=token_ids,
                sampling_params=params,
                seed=seed + index,
                arrival_time=arrival_time,
                priority=priority,
                cache_salt=salt,
                eos_token_ids=frozenset() if params.ignore_eos else self._eos_token_ids,
                bad_words_token_ids=bad_words,
            )
            for index in range(params.n)
        )
        return ProcessedRequest(request_id, text, token_ids, params, requests)

    def _parse(self, prompt: Prompt, special: bool) -> tuple[str | None, tuple[int, ...], str | None]:
        """(text, token ids, cache salt)."""
        if isinstance(prompt, str):
            return prompt, self._encode(prompt, special), None
        if not isinstance(prompt, Mapping):
            return None, _as_token_ids(prompt), None
        return self._parse_dict(prompt, special)

    def _parse_dict(
        self, prompt: Mapping[str, Any], special: bool
    ) -> tuple[str | None, tuple[int, ...], str | None]:
        unknown = [key for key in prompt if key not in _PROMPT_KEYS]
        if unknown:
            raise RequestError(f"a prompt has no key {unknown[0]!r}; known: {', '.join(_PROMPT_KEYS)}")
        salt = prompt.get("cache_salt")
        if salt is not None and (not isinstance(salt, str) or not salt):
            raise RequestError(f"cache_salt={salt!r} must be a non-empty string")
        text = prompt.get("prompt")
        if text is not None and not isinstance(text, str):
            raise RequestError(f"prompt is {text!r}; it must be a string")
        if prompt.get("prompt_token_ids") is not None:
            return text, _as_token_ids(prompt["prompt_token_ids"]), salt
        if text is None:
            raise RequestError("a prompt dict needs 'prompt' (text) or 'prompt_token_ids' (a list of ids)")
        return text, self._encode(text, special), salt

    def _encode(self, text: str, special: bool) -> tuple[int, ...]:
        if self._tokenizer is None:
            raise RequestError(
                "this engine has no tokenizer (skip_tokenizer_init=True); give {'prompt_token_ids': [...]}"
            )
        if not text:  # a tokenizer may put a beginning-of-sequence token there, but that is no prompt
            raise RequestError(
                "the prompt is empty; give at least one token (to start from nothing, give "
                "{'prompt_token_ids': [the beginning-of-sequence token]})"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the prompt is not valid Unicode: {error}") from error
        return tuple(self._tokenizer.encode(text, add_special_tokens=special))

    def _check_prompt(self, token_ids: tuple[int, ...]) -> None:
        if not token_ids:
            raise RequestError("the prompt is empty; give at least one token")
        self._check_ids(token_ids, "prompt")
        if len(token_ids) >= self._limits.max_model_len:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens and max_model_len is {self._limits.max_model_len}, "
                "which must hold the prompt and at least one new token; shorten the prompt or raise "
                "max_model_len"
            )

    def _check_ids(self, token_ids: Iterable[int], where: str) -> None:
        for token in token_ids:
            if not 0 <= token < self._limits.vocab_size:
                raise RequestError(
                    f"{where} has token id {token}, but the model's vocabulary ends at "
                    f"{self._limits.vocab_size - 1}; was it tokenized for another model?"
                )

    def _check_params(self, params: SamplingParams) -> SamplingParams:
        self._check_ids(params.logit_bias or (), "logit_bias")
        self._check_ids(params.allowed_token_ids or (), "allowed_token_ids")
        self._check_ids(params.stop_token_ids or (), "stop_token_ids")
        limit = self._limits.max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name)
            if asked is None or limit == -1:
                continue
            if asked == -1 or asked > limit:
                raise RequestError(
                    f"{name}={asked} is more than max_logprobs={limit}; ask for less, or raise the "
                    "engine's max_logprobs (-1: no limit)"
                )
        if self._tokenizer is None:
            if params.stop_strings or params.bad_words:
                raise RequestError(
                    "stop and bad_words need a tokenizer, and this engine has none "
                    "(skip_tokenizer_init=True); use stop_token_ids or logit_bias"
                )
            return params.replace(detokenize=False)
        return params

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word as tokens, at the start of a text and after a space: both spellings are banned."""
        spellings: dict[tuple[int, ...], None] = {}
        for word in words:
            for prefix in ("", " "):
                token_ids = self._encode(prefix + (word.lstrip() or word), special=False)
                if token_ids:
                    spellings[token_ids] = None
        return tuple(spellings)


def _as_token_ids(values: Any) -> tuple[int, ...]:
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__iter__"):
        raise RequestError(f"prompt token ids are {values!r}; they must be a list of integers")
    token_ids = []
    for token in values:
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise RequestError(f"prompt token ids hold {token!r}; they must be integers")
        token_ids.append(operator.index(token))  # NumPy's and torch's integers become Python's
    return tuple(token_ids)
