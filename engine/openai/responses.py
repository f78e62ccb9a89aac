"""Finished RequestOutputs into the objects `chat.completion` and `text_completion`."""

from collections.abc import Sequence
from typing import Any

from halimede.engine.openai.logprobs import Decode, chat_logprobs, completion_logprobs, prompt_logprobs
from halimede.engine.openai.requests import ChatRequest, CompletionRequest
from halimede.engine.outputs import CompletionOutput, PositionLogprobs, RequestOutput


def response_body(
    request: ChatRequest | CompletionRequest, outputs: Sequence[RequestOutput], decode: Decode
) -> dict[str, Any]:
    """The response to a request whose prompts gave these outputs, in the prompts' order."""
    if isinstance(request, ChatRequest):
        return _chat_completion(request, outputs)
    return _text_completion(request, outputs, decode)


def usage(outputs: Sequence[RequestOutput], *, echo_only: bool = False) -> dict[str, Any]:
    """The `usage` object: tokens read, written, and read from the prefix cache."""
    read = sum(len(output.prompt_token_ids or ()) for output in outputs)
    written = 0 if echo_only else sum(len(c.token_ids) for output in outputs for c in output.outputs)
    cached = sum(output.num_cached_tokens or 0 for output in outputs)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _chat_completion(request: ChatRequest, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    (output,) = outputs
    body = _envelope(request, "chat.completion", [_chat_choice(request, c) for c in output.outputs], outputs)
    if request.return_token_ids:
        body["prompt_token_ids"] = output.prompt_token_ids
    if output.prompt_logprobs is not None:
        body["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
    return body


def _chat_choice(request: ChatRequest, completion: CompletionOutput) -> dict[str, Any]:
    logprobs = None
    if request.top_logprobs is not None and completion.logprobs is not None:
        logprobs = chat_logprobs(completion.token_ids, completion.logprobs, request.top_logprobs)
    choice = {
        "index": completion.index,
        "message": {"role": request.role, "content": completion.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    return choice | ({"token_ids": list(completion.token_ids)} if request.return_token_ids else {})


def _text_completion(
    request: CompletionRequest, outputs: Sequence[RequestOutput], decode: Decode
) -> dict[str, Any]:
    choices = [_text_choice(request, output, c, decode) for output in outputs for c in output.outputs]
    for index, choice in enumerate(choices):  # of all prompts, n after n
        choice["index"] = index
    body = _envelope(request, "text_completion", choices, outputs)
    body["usage"] = usage(outputs, echo_only=request.echo_only)
    return body


def _text_choice(
    request: CompletionRequest, output: RequestOutput, completion: CompletionOutput, decode: Decode
) -> dict[str, Any]:
    prompt_ids = output.prompt_token_ids or []
    text, token_ids = completion.text, list(completion.token_ids)
    positions: list[PositionLogprobs | None] = list(completion.logprobs or ())
    if request.echo_only:
        text, token_ids, positions = "", [], []
    shown_ids = token_ids
    if request.echo:
        text = (decode(prompt_ids) if output.prompt is None else output.prompt) + text
        shown_ids, positions = [*prompt_ids, *token_ids], [*(output.prompt_logprobs or ()), *positions]
    wants_logprobs = request.sampling_params.logprobs is not None
    choice: dict[str, Any] = {
        "index": 0,
        "text": text,
        "logprobs": completion_logprobs(shown_ids, positions, decode) if wants_logprobs else None,
        "finish_reason": "length" if request.echo_only else completion.finish_reason,
        "stop_reason": None if request.echo_only else completion.stop_reason,
    }
    if request.prompt_logprobs and output.prompt_logprobs is not None:
        choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
    if request.return_token_ids:
        choice |= {"prompt_token_ids": prompt_ids, "token_ids": token_ids}
    return choice


def _envelope(
    request: ChatRequest | CompletionRequest,
    kind: str,
    choices: list[dict[str, Any]],
    outputs: Sequence[RequestOutput],
) -> dict[str, Any]:
    return {
        "id": request.id,
        "object": kind,
        "created": request.created,
        "model": request.model,
        "choices": choices,
        "usage": usage(outputs),
        "system_fingerprint": None,
    }
