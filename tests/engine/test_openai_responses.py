"""Results as the objects that OpenAI's clients read."""

import json
from typing import Any

from halimede import CompletionOutput, Logprob, RequestOutput, SamplingParams
from halimede.engine.openai.requests import parse_request
from halimede.engine.openai.responses import response_body

TEXTS = {1: "<s>", 2: "Hi", 3: " there", 4: "\ufffd", 5: " you"}


def decode(token_ids: list[int]) -> str:
    return "".join(TEXTS[token] for token in token_ids)


def position(*tokens: tuple[int, float, int]) -> dict[int, Logprob]:
    return {token: Logprob(logprob, rank, TEXTS[token]) for token, logprob, rank in tokens}


def output(*completions: CompletionOutput, **fields: Any) -> RequestOutput:
    known: dict[str, Any] = {"prompt": "Hi", "prompt_token_ids": [1, 2], "num_cached_tokens": 1} | fields
    return RequestOutput("0", outputs=list(completions), finished=True, **known)


def completed(index: int = 0, **fields: Any) -> CompletionOutput:
    known: dict[str, Any] = {"text": " there", "token_ids": [3], "finish_reason": "length"} | fields
    return CompletionOutput(index, **known)


def respond(endpoint: Any, body: dict[str, Any], *outputs: RequestOutput) -> dict[str, Any]:
    needed = {"messages": [{"role": "user", "content": "x"}]} if "chat" in endpoint else {"prompt": "x"}
    request = parse_request(endpoint, needed | body, ["m"], SamplingParams())
    response = response_body(request, outputs, decode)
    json.dumps(response, allow_nan=False)
    return response


def chat(body: dict[str, Any], *outputs: RequestOutput) -> dict[str, Any]:
    return respond("/v1/chat/completions", body, *outputs)


def completion(body: dict[str, Any], *outputs: RequestOutput) -> dict[str, Any]:
    return respond("/v1/completions", body, *outputs)


def test_a_chat_completion() -> None:
    result = output(completed(0), completed(1, text=" you", finish_reason="stop", stop_reason="x"))
    response = chat({"n": 2}, result)
    assert response.pop("id").startswith("chatcmpl-")
    assert response.pop("created") > 1_700_000_000
    assert response == {
        "object": "chat.completion",
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": " there", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            },
            {
                "index": 1,
                "message": {"role": "assistant", "content": " you", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": "x",
            },
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 2,
            "total_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
        "system_fingerprint": None,
    }


def test_log_probabilities_of_a_chat() -> None:
    # The sampled token is the third most probable one; one alternative is ruled out, one is half a character.
    at = position((3, -2.5, 3), (5, -0.1, 1), (4, float("-inf"), 2))
    result = output(completed(logprobs=[at], cumulative_logprob=-2.5))
    (choice,) = chat({"logprobs": True, "top_logprobs": 2}, result)["choices"]
    there = {"token": " there", "logprob": -2.5, "bytes": list(b" there")}
    you = {"token": " you", "logprob": -0.1, "bytes": list(b" you")}
    part = {"token": "\ufffd", "logprob": -9999.0, "bytes": None}
    assert choice["logprobs"] == {"content": [there | {"top_logprobs": [you, part]}], "refusal": None}
    (choice,) = chat({"logprobs": True}, result)["choices"]
    assert choice["logprobs"]["content"] == [there | {"top_logprobs": []}]


def test_a_text_completion_of_several_prompts() -> None:
    first = output(completed(0), completed(1, text=" you"))
    second = output(completed(0, text="!"), completed(1, text="?"), prompt_token_ids=[1, 2, 3])
    response = completion({"prompt": ["x", "y"], "n": 2}, first, second)
    assert response["id"].startswith("cmpl-")
    assert response["object"] == "text_completion"
    assert [(c["index"], c["text"]) for c in response["choices"]] == [
        (0, " there"),
        (1, " you"),
        (2, "!"),
        (3, "?"),
    ]
    assert response["choices"][0] == {
        "index": 0,
        "text": " there",
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }
    assert response["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 4,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def scored() -> RequestOutput:
    return output(
        completed(logprobs=[position((3, -2.5, 3), (5, -0.1, 1))]),
        prompt_logprobs=[None, position((2, -1.0, 1))],
    )


def test_log_probabilities_of_a_completion() -> None:
    (choice,) = completion({"logprobs": 1}, scored())["choices"]
    assert choice["text"] == " there"
    assert choice["logprobs"] == {
        "text_offset": [0],
        "token_logprobs": [-2.5],
        "tokens": [" there"],
        "top_logprobs": [{" there": -2.5, " you": -0.1}],
    }


def test_an_echo_holds_the_prompt_and_its_log_probabilities() -> None:
    (choice,) = completion({"echo": True, "logprobs": 1}, scored())["choices"]
    assert choice["text"] == "Hi there"
    assert choice["logprobs"] == {
        "text_offset": [0, 3, 5],
        "token_logprobs": [None, -1.0, -2.5],
        "tokens": ["<s>", "Hi", " there"],
        "top_logprobs": [None, {"Hi": -1.0}, {" there": -2.5, " you": -0.1}],
    }
    by_ids = output(completed(), prompt=None)
    assert completion({"prompt": [1, 2], "echo": True}, by_ids)["choices"][0]["text"] == "<s>Hi there"


def test_the_prompt_alone_without_what_was_generated() -> None:
    response = completion({"echo": True, "logprobs": 1, "max_tokens": 0}, scored())
    (choice,) = response["choices"]
    assert (choice["text"], choice["logprobs"]["tokens"]) == ("Hi", ["<s>", "Hi"])
    assert response["usage"]["completion_tokens"] == 0


def test_the_fields_that_vllm_adds() -> None:
    fields = {"return_token_ids": True, "prompt_logprobs": 1}
    expected = [None, {"2": {"logprob": -1.0, "rank": 1, "decoded_token": "Hi"}}]
    response = chat(fields, scored())
    assert (response["prompt_token_ids"], response["choices"][0]["token_ids"]) == ([1, 2], [3])
    assert response["prompt_logprobs"] == expected
    (choice,) = completion(fields, scored())["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([1, 2], [3])
    assert choice["prompt_logprobs"] == expected
