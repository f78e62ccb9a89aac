import copy
import math
import pickle
from typing import Any

import pytest

from halimede.errors import ConfigError, RequestError
from halimede.scheduler.sampling_params import RequestOutputKind, SamplingParams


def test_defaults() -> None:
    p = SamplingParams()
    assert (p.n, p.temperature, p.top_p, p.top_k, p.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (p.seed, p.stop, p.stop_token_ids, p.logprobs, p.prompt_logprobs) == (None,) * 5
    assert (p.max_tokens, p.min_tokens, p.ignore_eos) == (16, 0, False)
    assert (p.detokenize, p.skip_special_tokens, p.include_stop_str_in_output) == (True, True, False)
    assert p.output_kind is RequestOutputKind.CUMULATIVE
    assert (p.logit_bias, p.allowed_token_ids, p.bad_words, p.skip_reading_prefix_cache) == (None,) * 4
    assert p.stop_strings == ()
    assert not p.greedy
    assert p.reads_prefix_cache


OUT_OF_RANGE: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", 1.5),
    ("n", True),
    ("presence_penalty", 2.1),
    ("presence_penalty", -2.1),
    ("frequency_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("frequency_penalty", "0"),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", None),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_k", -2),
    ("top_k", 1.0),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("seed", 0.5),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", [1]),
    ("stop", 5),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", ["a"]),
    ("stop_token_ids", 5),
    ("stop_token_ids", "12"),
    ("ignore_eos", 1),
    ("detokenize", None),
    ("skip_special_tokens", "yes"),
    ("include_stop_str_in_output", 0),
    ("skip_reading_prefix_cache", 1),
    ("max_tokens", 0),
    ("max_tokens", 1.0),
    ("min_tokens", -1),
    ("logprobs", -2),
    ("prompt_logprobs", -2),
    ("output_kind", "delta"),
    ("logit_bias", [1]),
    ("logit_bias", {-1: 0.0}),
    ("logit_bias", {"1": 0.0}),
    ("logit_bias", {1: 101}),
    ("logit_bias", {1: "2"}),
    ("logit_bias", {1: math.nan}),
    ("allowed_token_ids", []),
    ("allowed_token_ids", [-1]),
    ("bad_words", "word"),
    ("bad_words", [""]),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_value_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**{name: value})
    assert f"{name}={value!r}" in str(error.value)
    assert "it must be" in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {"presence_penalty": -2, "frequency_penalty": 2.0, "repetition_penalty": 0.1},
        {"top_p": 1, "top_k": -1, "min_p": 1.0, "temperature": 0},
        {"top_p": 0.001, "top_k": 1, "min_p": 0},
        {"max_tokens": None, "min_tokens": 1000},
        {"max_tokens": 5, "min_tokens": 5},
        {"logprobs": -1, "prompt_logprobs": 0},
        {"logit_bias": {0: -100, 7: 100.0}, "allowed_token_ids": (1, 2), "bad_words": ["a b"]},
        {"seed": -2, "stop_token_ids": {3, 4}, "n": 3},
    ],
)
def test_limits_are_allowed(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    assert all(getattr(params, name) == value for name, value in values.items())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, ["min_tokens=5", "max_tokens=4", "lower min_tokens"]),
        ({"temperature": 0, "n": 2}, ["n=2", "temperature=0", "use n=1"]),
        ({"stop": "x", "detokenize": False}, ["stop=['x']", "detokenize=False", "stop_token_ids"]),
        (
            {"skip_reading_prefix_cache": False, "prompt_logprobs": 1},
            ["skip_reading_prefix_cache=False", "prompt_logprobs"],
        ),
    ],
)
def test_contradiction_names_both_sides_and_the_remedy(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**values)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(("keyword", "closest"), [("temprature", "temperature"), ("max_token", "max_tokens")])
def test_unknown_keyword_names_the_closest(keyword: str, closest: str) -> None:
    with pytest.raises(ConfigError, match=f"no option '{keyword}'; did you mean '{closest}'"):
        SamplingParams(**{keyword: 1})
    with pytest.raises(ConfigError, match=f"did you mean '{closest}'"):
        SamplingParams().replace(**{keyword: 1})


def test_stop_is_a_string_or_a_list() -> None:
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams(stop=["ab", "c"]).stop_strings == ("ab", "c")
    assert SamplingParams(stop=[]).stop_strings == ()


def test_tiny_temperatures_are_raised_and_zero_is_greedy() -> None:
    assert SamplingParams(temperature=1e-5).temperature == 0.01
    assert SamplingParams(temperature=0.0).greedy
    assert not SamplingParams(temperature=1e-5).greedy


def test_prompt_logprobs_keep_from_reading_the_prefix_cache() -> None:
    assert not SamplingParams(prompt_logprobs=0).reads_prefix_cache
    assert not SamplingParams(skip_reading_prefix_cache=True).reads_prefix_cache
    assert SamplingParams(skip_reading_prefix_cache=False).reads_prefix_cache


def test_copies() -> None:
    params = SamplingParams(temperature=0.5, stop=["x"])
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params
    assert params.replace(temperature=0.0) == SamplingParams(temperature=0.0, stop=["x"])


def test_fields_may_be_changed_but_not_invented() -> None:
    params = SamplingParams()
    params.temperature = 0.5
    assert params == SamplingParams(temperature=0.5)
    with pytest.raises(AttributeError, match="temprature"):
        params.temprature = 0.5  # type: ignore[attr-defined]


def test_seed_minus_one_is_no_seed_as_in_vllm() -> None:
    assert SamplingParams(seed=-1).seed is None
