"""Bodies of the OpenAI API into prompts and sampling parameters; every kind of bad body names its field."""

import json
from typing import Any

import pytest

from halimede import SamplingParams
from halimede.engine.openai.errors import ApiError, error_body
from halimede.engine.openai.requests import ChatRequest, CompletionRequest, endpoint_of, parse_request

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
TALK = [{"role": "user", "content": "hi"}]
DEFAULTS = SamplingParams(temperature=0.6, top_k=20)
SAMPLING = {
    "n": 2,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.1,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.05,
    "seed": 3,
    "stop": ["a", "b"],
    "stop_token_ids": [7],
    "ignore_eos": True,
    "min_tokens": 2,
    "prompt_logprobs": 1,
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
    "allowed_token_ids": [7, 8],
    "bad_words": ["x"],
}


def chat(**fields: Any) -> ChatRequest:
    request = parse_request(CHAT, {"messages": TALK, **fields}, ["m", "alias"], DEFAULTS)
    assert isinstance(request, ChatRequest)
    return request


def completion(**fields: Any) -> CompletionRequest:
    request = parse_request(COMPLETION, {"prompt": "hi", **fields}, ["m", "alias"], DEFAULTS)
    assert isinstance(request, CompletionRequest)
    return request


def refused(endpoint: Any, body: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_request(endpoint, body, ["m"], DEFAULTS)
    return caught.value


def rendered(messages: list[dict[str, Any]], **options: Any) -> str:
    """In render_chat's place: says what it was given."""
    return json.dumps([messages, options])


@pytest.mark.parametrize("parse", [chat, completion])
def test_sampling_fields_mean_what_they_mean_in_sampling_params(parse: Any) -> None:
    params = parse(**SAMPLING, logit_bias={"7": 1.5}, max_tokens=9).sampling_params
    assert params == SamplingParams(**SAMPLING, logit_bias={7: 1.5}, max_tokens=9)


def test_what_is_left_out_or_null_is_the_models_recommendation() -> None:
    assert chat().sampling_params == DEFAULTS.replace(max_tokens=None)
    assert completion().sampling_params == DEFAULTS.replace(max_tokens=16)
    nothing = dict.fromkeys([*SAMPLING, "logit_bias", "max_tokens", "logprobs", "stream", "model"])
    assert chat(**nothing, tools=None).sampling_params == DEFAULTS.replace(max_tokens=None)
    assert completion(**nothing, echo=None).sampling_params == DEFAULTS.replace(max_tokens=16)


def test_the_newer_name_of_max_tokens_wins() -> None:
    assert chat(max_completion_tokens=3, max_tokens=9).sampling_params.max_tokens == 3
    assert chat(max_completion_tokens=None, max_tokens=9).sampling_params.max_tokens == 9


def test_fields_that_change_nothing_are_taken() -> None:
    plain = chat().sampling_params
    ignored = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "flex"}
    neutral = {"response_format": {"type": "text"}, "modalities": ["text"], "reasoning_effort": None}
    assert chat(**ignored, **neutral, stream=False).sampling_params == plain
    assert completion(user="u", best_of=1, suffix="").sampling_params == completion().sampling_params


def test_log_probabilities_are_asked_for_in_two_ways() -> None:
    assert chat().top_logprobs is chat(logprobs=False).sampling_params.logprobs is None
    assert chat(logprobs=True).top_logprobs == chat(logprobs=True).sampling_params.logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).sampling_params.logprobs == 3
    assert completion(logprobs=3).sampling_params.logprobs == 3
    assert completion(logprobs=3).sampling_params.prompt_logprobs is None
    assert completion(logprobs=3, echo=True).sampling_params.prompt_logprobs == 3


def test_names_of_the_model() -> None:
    assert chat().model == completion().model == "m"
    assert chat(model="alias").model == "alias"
    error = refused(CHAT, {"messages": TALK, "model": "gpt-4o"})
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert "'gpt-4o'" in str(error)
    assert "'m'" in str(error)


def test_a_chat_goes_through_the_template() -> None:
    messages, options = json.loads(chat().prompts(rendered)[0])
    assert messages == TALK
    assert options == {
        "add_generation_prompt": True,
        "continue_final_message": False,
        "tools": None,
        "template_kwargs": {},
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    request = chat(
        tools=[tool],
        tool_choice="auto",
        chat_template_kwargs={"enable_thinking": False},
        documents=[{"text": "d"}],
        cache_salt="s",
    )
    (prompt,) = request.prompts(rendered)
    assert prompt["cache_salt"] == "s"
    _, options = json.loads(prompt["prompt"])
    assert options["tools"] == [tool]
    assert options["template_kwargs"] == {"enable_thinking": False, "documents": [{"text": "d"}]}
    assert not request.add_special_tokens
    assert chat(tools=[tool], tool_choice="none").template_options["tools"] is None


def test_a_final_message_may_be_continued() -> None:
    answer = [*TALK, {"role": "assistant", "content": "Well, "}]
    assert chat().role == "assistant"
    for fields in ({"continue_final_message": True}, {"add_generation_prompt": False}):
        request = chat(messages=answer, **fields)
        assert not request.template_options["add_generation_prompt"]
        assert request.role == "assistant"
    assert chat(add_generation_prompt=False).role == "user"


def test_templates_read_arguments_of_tool_calls_as_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    request = chat(messages=[*TALK, {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert request.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert call["function"]["arguments"] == '{"x": 1}'


@pytest.mark.parametrize(
    ("prompt", "inputs"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1, 2], [3]], [[1, 2], [3]])],
)
def test_prompts_are_texts_or_token_ids(prompt: Any, inputs: list[Any]) -> None:
    assert completion(prompt=prompt).prompts(rendered) == inputs
    salted = completion(prompt=prompt, cache_salt="s").prompts(rendered)
    assert [p["cache_salt"] for p in salted] == ["s"] * len(inputs)
    assert [p.get("prompt", p.get("prompt_token_ids")) for p in salted] == inputs


def test_the_prompt_alone_may_be_scored() -> None:
    request = completion(echo=True, max_tokens=0, logprobs=1)
    assert request.echo_only
    assert request.sampling_params.max_tokens == 1
    assert refused(COMPLETION, {"prompt": "x", "max_tokens": 0}).param == "max_tokens"


BAD = [
    (CHAT, 3, None, "JSON object"),
    (CHAT, {}, "messages", "at least one message"),
    (CHAT, {"messages": "hi"}, "messages", "a list"),
    (CHAT, {"messages": ["hi"]}, "messages[0]", "role"),
    (CHAT, {"messages": [*TALK, {"content": "x"}]}, "messages[1]", "role"),
    (CHAT, {"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "list of parts"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": "f"}]}, "messages[0].tool_calls", "arguments"),
    (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": "f"}]}]},
        "messages[0].tool_calls",
        "arguments",
    ),
    (CHAT, {"messages": TALK, "temprature": 1}, "temprature", "did you mean 'temperature'"),
    (CHAT, {"messages": TALK, "temperature": -1}, "temperature", "-1"),
    (CHAT, {"messages": TALK, "temperature": "0.5"}, "temperature", "'0.5'"),
    (CHAT, {"messages": TALK, "max_completion_tokens": 0}, "max_tokens", "0"),
    (CHAT, {"messages": TALK, "logprobs": 3}, "logprobs", "true or false"),
    (CHAT, {"messages": TALK, "top_logprobs": 3}, "top_logprobs", "logprobs=true"),
    (CHAT, {"messages": TALK, "logprobs": True, "top_logprobs": -1}, "top_logprobs", "at least 0"),
    (CHAT, {"messages": TALK, "logit_bias": {"x": 1}}, "logit_bias", "'x'"),
    (CHAT, {"messages": TALK, "logit_bias": {"1": 1000}}, "logit_bias", "1000"),
    (CHAT, {"messages": TALK, "logit_bias": [1]}, "logit_bias", "an object"),
    (CHAT, {"messages": TALK, "stop": [""]}, "stop", "non-empty"),
    (CHAT, {"messages": TALK, "n": True}, "n", "integer"),
    (CHAT, {"messages": TALK, "tool_choice": "required"}, "tool_choice", "'auto' or 'none'"),
    (CHAT, {"messages": TALK, "response_format": {"type": "json_object"}}, "response_format", "json_object"),
    (CHAT, {"messages": TALK, "chat_template": "/etc/passwd"}, "chat_template", "start the engine"),
    (CHAT, {"messages": TALK, "stream": "yes"}, "stream", "true or false"),
    (CHAT, {"messages": TALK, "stream_options": {"include_usage": 1}}, "include_usage", "true or false"),
    (CHAT, {"messages": TALK, "priority": 1.5}, "priority", "an integer"),
    (CHAT, {"messages": TALK, "model": 3}, "model", "a string"),
    (CHAT, {"messages": TALK, "echo": True}, "echo", "not supported"),
    (CHAT, {"messages": TALK, "prompt": "x"}, "prompt", "no option"),
    (COMPLETION, {}, "prompt", "list of token ids"),
    (COMPLETION, {"prompt": []}, "prompt", "list of token ids"),
    (COMPLETION, {"prompt": [1, "a"]}, "prompt", "list of token ids"),
    (COMPLETION, {"prompt": "x", "logprobs": True}, "logprobs", "an integer"),
    (COMPLETION, {"prompt": "x", "best_of": 2}, "best_of", "leave it out or use 1"),
    (COMPLETION, {"prompt": "x", "suffix": "y"}, "suffix", "not supported"),
]


@pytest.mark.parametrize(("endpoint", "body", "param", "words"), BAD)
def test_a_bad_body_is_an_error_that_names_the_field(
    endpoint: Any, body: Any, param: str, words: str
) -> None:
    error = refused(endpoint, body)
    assert error.status == 400
    assert error.param == param
    assert error.code
    assert words in str(error)
    assert error_body(error) == {
        "error": {
            "message": str(error),
            "type": "invalid_request_error",
            "param": param,
            "code": error.code,
        }
    }


def test_endpoints() -> None:
    assert endpoint_of(CHAT) == CHAT
    assert endpoint_of(COMPLETION) == COMPLETION
    for url in ("/v1/embeddings", None, 3, []):
        with pytest.raises(ApiError, match="url is"):
            endpoint_of(url)
