"""Log-probabilities in the two forms of the API."""

from collections.abc import Callable, Sequence
from typing import Any

from halimede.engine.outputs import Logprob, PositionLogprobs

# JSON has no minus infinity, which a token that was ruled out has; vLLM writes the same number.
_LOWEST = -9999.0
_REPLACEMENT = "\ufffd"

Decode = Callable[[list[int]], str]
"""Token ids to their text."""


def chat_logprobs(
    token_ids: Sequence[int], positions: Sequence[PositionLogprobs], top: int
) -> dict[str, Any]:
    """The `logprobs` of a chat choice, with `top` alternatives per token."""
    content = []
    for token, position in zip(token_ids, positions, strict=True):
        best = sorted(position.items(), key=lambda entry: entry[1].rank or 0)[:top]
        content.append(
            _entry(token, position[token]) | {"top_logprobs": [_entry(t, logprob) for t, logprob in best]}
        )
    return {"content": content, "refusal": None}


def completion_logprobs(
    token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None], decode: Decode
) -> dict[str, Any]:
    """The `logprobs` of a text completion's choice. The first token of an echoed prompt has none.

    text_offset counts the characters of the tokens' own texts, from the start of the choice's text.
    """
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []
    offset = 0
    for token, position in zip(token_ids, positions, strict=True):
        logprob = position[token] if position else None
        text = _text(token, logprob) if logprob else decode([token])
        tokens.append(text)
        text_offset.append(offset)
        offset += len(text)
        token_logprobs.append(_number(logprob) if logprob else None)
        top_logprobs.append(_by_text(position) if position else None)
    return {
        "text_offset": text_offset,
        "token_logprobs": token_logprobs,
        "tokens": tokens,
        "top_logprobs": top_logprobs,
    }


def prompt_logprobs(positions: Sequence[PositionLogprobs | None]) -> list[dict[str, Any] | None]:
    """vLLM's field of this name: for each prompt token a dict by token id."""
    return [
        None
        if position is None
        else {
            str(token): {
                "logprob": _number(logprob),
                "rank": logprob.rank,
                "decoded_token": logprob.decoded_token,
            }
            for token, logprob in position.items()
        }
        for position in positions
    ]


def _entry(token: int, logprob: Logprob) -> dict[str, Any]:
    text = _text(token, logprob)
    # A part of a character has a text that does not tell its bytes.
    data = None if _REPLACEMENT in text else list(text.encode("utf-8", "replace"))
    return {"token": text, "logprob": _number(logprob), "bytes": data}


def _by_text(position: PositionLogprobs) -> dict[str, float]:
    """Tokens of equal text (parts of characters) share one entry, the most probable one's."""
    shown: dict[str, float] = {}
    for token, logprob in position.items():
        text = _text(token, logprob)
        shown[text] = max(_number(logprob), shown.get(text, _LOWEST))
    return shown


def _text(token: int, logprob: Logprob) -> str:
    """An engine without a tokenizer gives tokens no text."""
    return f"token_id:{token}" if logprob.decoded_token is None else logprob.decoded_token


def _number(logprob: Logprob) -> float:
    return max(logprob.logprob, _LOWEST)
