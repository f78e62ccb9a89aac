"""Which fields a body may have: OpenAI's, and those that vLLM adds."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from halimede.engine.openai.errors import ApiError
from halimede.errors import ConfigError
from halimede.keywords import check_keywords

_T = TypeVar("_T")

SAMPLING_FIELDS = (
    "n",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "prompt_logprobs",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "allowed_token_ids",
    "bad_words",
)
"""Fields that are SamplingParams' own, by name and meaning."""

_BOTH = (
    "model",
    "max_tokens",
    "logprobs",
    "logit_bias",
    "stream",
    "stream_options",
    "add_special_tokens",
    "return_token_ids",
    "cache_salt",
    "priority",
)
CHAT_FIELDS = (
    *SAMPLING_FIELDS,
    *_BOTH,
    "messages",
    "max_completion_tokens",
    "top_logprobs",
    "tools",
    "tool_choice",
    "documents",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
)
COMPLETION_FIELDS = (*SAMPLING_FIELDS, *_BOTH, "prompt", "echo")

_IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
)
"""Fields about OpenAI's own service: whatever they say changes no result here."""

_NEUTRAL: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "audio": (),
        "best_of": (1,),
        "chat_template": (),
        "echo": (False,),
        "function_call": ("none",),
        "functions": ([],),
        "length_penalty": (1,),
        "logits_processors": ([],),
        "mm_processor_kwargs": ({},),
        "modalities": (["text"],),
        "prediction": (),
        "reasoning_effort": (),
        "response_format": ({"type": "text"},),
        "return_tokens_as_token_ids": (False,),
        "spaces_between_special_tokens": (True,),
        "structured_outputs": (),
        "suffix": ("",),
        "truncate_prompt_tokens": (),
        "use_beam_search": (False,),
        "verbosity": (),
        "web_search_options": (),
    }
)
"""Fields that exist elsewhere, with the values that ask for what happens anyway (null always does)."""


def check_fields(body: object, known: tuple[str, ...], endpoint: str) -> dict[str, Any]:
    """The known fields of a body that are not null.

    Raises ApiError for a body that is no object, a field that nobody knows, or one that asks for something
    that is not supported.
    """
    if not isinstance(body, Mapping):
        raise ApiError(f"the body is {_show(body)}; it must be a JSON object", code="invalid_type")
    given = {}
    for name, value in body.items():
        if name in known:
            if value is not None:
                given[name] = value
        elif name in _NEUTRAL:
            _check_neutral(name, value)
        elif name not in _IGNORED:
            try:
                check_keywords([name], known, endpoint)
            except ConfigError as error:
                raise ApiError(str(error), param=name, code="unknown_parameter") from error
    return given


def take(body: Mapping[str, Any], name: str, kind: type[_T], default: _T) -> _T:
    """A field of a body that must be of one type; a boolean is no integer."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        must = {bool: "true or false", int: "an integer", str: "a string", dict: "an object", list: "a list"}
        raise ApiError(f"{name} is {_show(value)}; it must be {must[kind]}", param=name, code="invalid_type")
    return value


def _check_neutral(name: str, value: object) -> None:
    allowed = _NEUTRAL[name]
    if value is None or value in allowed:
        return
    remedy = f"leave it out or use {' or '.join(_show(v) for v in allowed)}" if allowed else "leave it out"
    if name == "chat_template":
        remedy = "start the engine with chat_template=..."
    raise ApiError(
        f"{name}={_show(value)} is not supported; {remedy}", param=name, code="unsupported_parameter"
    )


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
