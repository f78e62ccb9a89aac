"""Bodies of /v1/chat/completions and /v1/completions into prompts and SamplingParams.

Raises ApiError for whatever is wrong with a body; what depends on the model (lengths, token ids, the chat
template) is checked when the prompts are rendered and submitted.
"""

import json
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from halimede.engine.input_processor import Prompt
from halimede.engine.openai.errors import ApiError
from halimede.engine.openai.fields import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    SAMPLING_FIELDS,
    check_fields,
    take,
)
from halimede.errors import RequestError
from halimede.scheduler.sampling_params import SamplingParams

Endpoint = Literal["/v1/chat/completions", "/v1/completions"]
_DEFAULT_COMPLETION_TOKENS = 16  # the API's own; a chat answer has no limit but the model's


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """What both endpoints share. id: of the response; created: seconds since 1970."""

    id: str
    created: int
    model: str
    sampling_params: SamplingParams
    add_special_tokens: bool
    priority: int
    cache_salt: str | None
    return_token_ids: bool
    stream: bool
    include_usage: bool


@dataclass(frozen=True, slots=True)
class ChatRequest(ApiRequest):
    """A call of /v1/chat/completions. top_logprobs: None when no log-probabilities were asked for."""

    messages: list[dict[str, Any]]
    template_options: dict[str, Any] = field(default_factory=dict)
    top_logprobs: int | None = None

    def prompts(self, render_chat: Callable[..., str]) -> list[Prompt]:
        """The one prompt, through LLM.render_chat or its like. RequestError from the template."""
        return [_salted(render_chat(self.messages, **self.template_options), self.cache_salt)]

    @property
    def role(self) -> str:
        """Who speaks in the answer: whoever's message is continued, else the assistant."""
        starts_a_message = self.template_options["add_generation_prompt"]
        return "assistant" if starts_a_message else str(self.messages[-1].get("role"))


@dataclass(frozen=True, slots=True)
class CompletionRequest(ApiRequest):
    """A call of /v1/completions. With echo the prompt is part of the text.

    echo_only: max_tokens was 0, so that the prompt alone is wanted, with its log-probabilities.
    prompt_logprobs: show them in vLLM's field of this name (echo has them in `logprobs`).
    """

    inputs: list[Prompt]
    echo: bool = False
    echo_only: bool = False
    prompt_logprobs: bool = False

    def prompts(self, render_chat: Callable[..., str]) -> list[Prompt]:
        """The prompts; nothing is rendered."""
        return [_salted(prompt, self.cache_salt) for prompt in self.inputs]


def parse_request(
    endpoint: Endpoint, body: object, models: Collection[str], defaults: SamplingParams
) -> ChatRequest | CompletionRequest:
    """Check a body.

    models: names that the body's `model` may have, the first one that of a body without any.
    defaults: what the model recommends for sampling fields that the body leaves out.
    """
    if endpoint == "/v1/chat/completions":
        return _parse_chat(check_fields(body, CHAT_FIELDS, endpoint), models, defaults)
    return _parse_completion(check_fields(body, COMPLETION_FIELDS, endpoint), models, defaults)


def _parse_chat(body: dict[str, Any], models: Collection[str], defaults: SamplingParams) -> ChatRequest:
    top_logprobs = _chat_logprobs(body)
    limit = body.get("max_completion_tokens", body.get("max_tokens"))
    params = _sampling_params(body, defaults, max_tokens=limit, logprobs=top_logprobs)
    return ChatRequest(
        **_shared(body, models, "chatcmpl", special=False),
        sampling_params=params,
        messages=_messages(body),
        template_options=_template_options(body),
        top_logprobs=top_logprobs,
    )


def _parse_completion(
    body: dict[str, Any], models: Collection[str], defaults: SamplingParams
) -> CompletionRequest:
    echo = take(body, "echo", bool, False)
    limit = body.get("max_tokens", _DEFAULT_COMPLETION_TOKENS)
    echo_only = echo and limit == 0 and not isinstance(limit, bool)
    logprobs = take(body, "logprobs", int, -1) if "logprobs" in body else None
    more = {"prompt_logprobs": logprobs} if echo and logprobs is not None else {}
    params = _sampling_params(body | more, defaults, max_tokens=1 if echo_only else limit, logprobs=logprobs)
    return CompletionRequest(
        **_shared(body, models, "cmpl", special=True),
        sampling_params=params,
        inputs=_inputs(body),
        echo=echo,
        echo_only=echo_only,
        prompt_logprobs="prompt_logprobs" in body,
    )


def _shared(body: dict[str, Any], models: Collection[str], prefix: str, *, special: bool) -> dict[str, Any]:
    options = take(body, "stream_options", dict, {})
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": _model(body, models),
        "add_special_tokens": take(body, "add_special_tokens", bool, special),
        "priority": take(body, "priority", int, 0),
        "cache_salt": take(body, "cache_salt", str, "") if "cache_salt" in body else None,
        "return_token_ids": take(body, "return_token_ids", bool, False),
        "stream": take(body, "stream", bool, False),
        "include_usage": take(options, "include_usage", bool, False),
    }


def _model(body: dict[str, Any], models: Collection[str]) -> str:
    name = take(body, "model", str, next(iter(models)))
    if name not in models:
        raise ApiError(
            f"the model {name!r} does not exist here; name {' or '.join(map(repr, models))}, leave model "
            "out, or give the model this name too (served_model_name)",
            param="model",
            code="model_not_found",
            status=404,
        )
    return name


def _sampling_params(
    body: dict[str, Any], defaults: SamplingParams, *, max_tokens: Any, logprobs: int | None
) -> SamplingParams:
    changes = {name: body[name] for name in SAMPLING_FIELDS if name in body}
    if "logit_bias" in body:
        changes["logit_bias"] = _logit_bias(body)
    try:
        return defaults.replace(**changes, max_tokens=max_tokens, logprobs=logprobs)
    except RequestError as error:
        named = [name for name in (*changes, "max_tokens", "logprobs") if f" {name}=" in f" {error}"]
        raise ApiError(str(error), param=named[0] if named else None, code="invalid_value") from error


def _logit_bias(body: dict[str, Any]) -> dict[int, Any]:
    bias = take(body, "logit_bias", dict, {})
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError as error:
        raise ApiError(
            f"logit_bias has a key that is no token id: {error}", param="logit_bias", code="invalid_value"
        ) from error


def _chat_logprobs(body: dict[str, Any]) -> int | None:
    wanted = take(body, "logprobs", bool, False)
    count = take(body, "top_logprobs", int, 0)
    if count < 0:
        raise ApiError(f"top_logprobs={count} must be at least 0", param="top_logprobs", code="invalid_value")
    if count and not wanted:
        raise ApiError(
            f"top_logprobs={count} needs logprobs=true; set it, or leave top_logprobs out",
            param="top_logprobs",
            code="invalid_value",
        )
    return count if wanted else None


def _messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    messages = take(body, "messages", list, [])
    if not messages:
        raise ApiError(
            "messages is missing or empty; give at least one message",
            param="messages",
            code="missing_required_parameter",
        )
    return [_message(message, index) for index, message in enumerate(messages)]


def _message(message: object, index: int) -> dict[str, Any]:
    """A message as templates read it: the arguments of tool calls are objects, not the text of one."""
    where = f"messages[{index}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ApiError(
            f"{where} must be an object with a role (user, assistant, system, tool) and a content",
            param=where,
            code="invalid_type",
        )
    if not isinstance(message.get("content"), str | list | None):
        raise ApiError(
            f"{where}.content must be a string or a list of parts",
            param=f"{where}.content",
            code="invalid_type",
        )
    calls = message.get("tool_calls")
    if not calls:
        return message
    try:
        return message | {"tool_calls": [_tool_call(call) for call in calls]}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ApiError(
            f"{where}.tool_calls must be a list of {{'function': {{'name': ..., 'arguments': a JSON object "
            f"as text}}}}: {error!r}",
            param=f"{where}.tool_calls",
            code="invalid_value",
        ) from error


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    return {**call, "function": {**function, "arguments": arguments}}


def _template_options(body: dict[str, Any]) -> dict[str, Any]:
    """Options of render_chat."""
    choice = body.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise ApiError(
            f"tool_choice={choice!r} is not supported; use 'auto' or 'none'",
            param="tool_choice",
            code="unsupported_parameter",
        )
    tools = take(body, "tools", list, [])
    kwargs = take(body, "chat_template_kwargs", dict, {})
    if "documents" in body:
        kwargs = {"documents": take(body, "documents", list, []), **kwargs}
    continues = take(body, "continue_final_message", bool, False)
    return {
        # vLLM's default is true even then, and the two contradict each other.
        "add_generation_prompt": take(body, "add_generation_prompt", bool, not continues),
        "continue_final_message": continues,
        "tools": tools if choice == "auto" and tools else None,
        "template_kwargs": kwargs,
    }


def _inputs(body: dict[str, Any]) -> list[Prompt]:
    """`prompt`: a text, token ids, or a list of either."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(p, int) for p in prompt):
            return [prompt]
        if all(isinstance(p, str) for p in prompt) or all(isinstance(p, list) for p in prompt):
            return list(prompt)
    code = "missing_required_parameter" if not prompt else "invalid_type"
    raise ApiError(
        "prompt is missing or of the wrong type; it must be a string, a list of strings, a list of token ids "
        "or a list of such lists",
        param="prompt",
        code=code,
    )


def _salted(prompt: Prompt, salt: str | None) -> Prompt:
    if salt is None:
        return prompt
    key = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
    return {key: prompt, "cache_salt": salt}


def endpoint_of(url: object) -> Endpoint:
    """The endpoint that a path names. ApiError for any other."""
    if url == "/v1/chat/completions" or url == "/v1/completions":
        return "/v1/chat/completions" if url == "/v1/chat/completions" else "/v1/completions"
    raise ApiError(
        f"url is {url!r}; it must be '/v1/chat/completions' or '/v1/completions'",
        param="url",
        code="invalid_url",
    )
