"""What `halimede bench` runs: random token ids, or the requests of a file."""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halimede.errors import RequestError

if TYPE_CHECKING:
    from halimede.engine.llm import LLM

_DEFAULT_OUTPUT_LEN = 128


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One prompt and how many tokens to generate for it."""

    prompt_token_ids: list[int]
    output_len: int


def random_requests(
    llm: "LLM", count: int, input_len: int, output_len: int, source: random.Random
) -> list[BenchRequest]:
    """`count` prompts of input_len random tokens each; no two share a prefix worth caching.

    Raises RequestError when prompt and completion do not fit max_model_len.
    """
    if input_len + output_len > llm.max_model_len:
        raise RequestError(
            f"{input_len} prompt tokens and {output_len} new ones are more than "
            f"max_model_len={llm.max_model_len}; lower --input-len or --output-len, or raise --max-model-len"
        )
    vocabulary = range(llm.model_config.vocab_size)
    return [BenchRequest(source.choices(vocabulary, k=input_len), output_len) for _ in range(count)]


def read_dataset(llm: "LLM", path: Path, count: int, output_len: int | None) -> list[BenchRequest]:
    """The first `count` requests of a file that fit max_model_len.

    The file: JSON lines of OpenAI's batch format or with a "prompt" each, or ShareGPT's JSON list. output_len
    None takes what an entry says: its max_tokens, or the length of the answer that it holds.

    Raises RequestError for a file that cannot be read or has no request that fits.
    """
    requests: list[BenchRequest] = []
    for entry in _entries(path):
        if len(requests) == count:
            break
        request = _parse(llm, entry, output_len, path)
        if request and len(request.prompt_token_ids) + request.output_len <= llm.max_model_len:
            requests.append(request)
    if not requests:
        raise RequestError(f"{path} has no request that fits max_model_len={llm.max_model_len}")
    return requests


def _entries(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            yield from json.loads(text)
            return
        for line in text.splitlines():
            if line.strip():
                yield json.loads(line)
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{path} cannot be read ({error}); give JSON lines of requests, or a JSON list"
        ) from error


def _parse(llm: "LLM", entry: Mapping[str, Any], output_len: int | None, path: Path) -> BenchRequest | None:
    """None for a conversation that nobody answers."""
    tokenizer = llm.get_tokenizer()
    if "conversations" in entry:  # ShareGPT
        turns = [turn["value"] for turn in entry["conversations"][:2]]
        if len(turns) < 2:
            return None
        prompt, answer = (list(tokenizer.encode(turn)) for turn in turns)
        return BenchRequest(prompt, output_len or max(1, len(answer)))
    body = entry.get("body", entry)
    wanted = output_len or body.get("max_completion_tokens") or body.get("max_tokens") or _DEFAULT_OUTPUT_LEN
    if "messages" in body:
        text = llm.render_chat(body["messages"])
        return BenchRequest(list(tokenizer.encode(text, add_special_tokens=False)), wanted)
    if isinstance(body.get("prompt"), str):
        return BenchRequest(list(tokenizer.encode(body["prompt"])), wanted)
    raise RequestError(
        f"{path}: an entry has none of messages, prompt and conversations, but {list(body)[:5]}"
    )
