"""How the tokens of one request are chosen: vLLM's names, defaults and meanings."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from halimede.errors import RequestError
from halimede.keywords import KeywordChecked

# Temperatures below this divide logits into overflow; vLLM clamps at the same value.
_MIN_TEMPERATURE = 1e-2


class RequestOutputKind(Enum):
    """What each RequestOutput of a stream holds."""

    CUMULATIVE = 0
    """Everything generated so far."""
    DELTA = 1
    """Only what is new since the last output."""
    FINAL_ONLY = 2
    """Nothing until the request is finished."""


@dataclass(slots=True)
class SamplingParams(KeywordChecked):
    """Sampling settings of one request; names and defaults are vLLM's.

    n: completions per prompt.
    presence_penalty, frequency_penalty: in [-2, 2], subtracted from the logits of tokens generated so far.
    repetition_penalty: > 0; divides (positive) or multiplies (negative) logits of tokens in prompt or output.
    temperature: 0 is greedy.
    top_p, top_k, min_p: nucleus mass in (0, 1]; number of tokens (0 or -1: all); fraction of the top
        probability in [0, 1].
    seed: makes the request's tokens reproducible whatever else is in the batch; None or -1: no seed.
    stop: strings that end the completion; not part of the text unless include_stop_str_in_output.
    stop_token_ids: tokens that end the completion.
    ignore_eos: generate on after the end-of-sequence token.
    max_tokens: tokens per completion; None is up to the model's length.
    min_tokens: tokens before an end-of-sequence or stop token may come.
    logprobs: top log-probabilities per generated token (0: of the sampled one only; -1: of all tokens).
    prompt_logprobs: the same for each prompt token.
    detokenize: False leaves the text empty.
    skip_special_tokens: leave special tokens out of the text.
    include_stop_str_in_output: keep the stop string in the text.
    output_kind: what each output of a stream holds.
    logit_bias: token id to a number in [-100, 100] added to its logit.
    allowed_token_ids: only these tokens may be generated.
    bad_words: words that may not be generated.
    skip_reading_prefix_cache: compute the whole prompt; None does so only for prompt_logprobs.

    Fields may be changed, as with vLLM's; the engine checks and copies them when a request is made.

    Raises RequestError for a value out of range or a contradiction, ConfigError for an unknown keyword.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] | str | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    skip_reading_prefix_cache: bool | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        _check_ranges(self)
        _check_contradictions(self)
        if self.seed == -1:  # vLLM's spelling of "no seed"
            self.seed = None
        if 0 < self.temperature < _MIN_TEMPERATURE:
            self.temperature = _MIN_TEMPERATURE

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, however it was given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0

    @property
    def reads_prefix_cache(self) -> bool:
        """Whether cached blocks may stand in for prompt tokens (their logits would be missing)."""
        if self.skip_reading_prefix_cache is not None:
            return not self.skip_reading_prefix_cache
        return self.prompt_logprobs is None

    def clone(self) -> "SamplingParams":
        """A copy."""
        return self.replace()

    def replace(self, **changes: Any) -> "SamplingParams":
        """A copy with these fields changed."""
        return dataclasses.replace(self, **changes)


_INTS = ("n", "top_k", "min_tokens")
_OPTIONAL_INTS = ("seed", "max_tokens", "logprobs", "prompt_logprobs")
_FLOATS = (
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "min_p",
)
_BOOLS = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "skip_reading_prefix_cache",
)


def _fail(name: str, value: object, must: str) -> None:
    raise RequestError(f"sampling parameter {name}={value!r} is not valid: it must be {must}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: object) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)


def _check_types(p: SamplingParams) -> None:
    _check_numbers(p)
    for name in _BOOLS:
        value = getattr(p, name)
        if not isinstance(value, bool) and not (value is None and name == "skip_reading_prefix_cache"):
            _fail(name, value, "True or False")
    if not isinstance(p.output_kind, RequestOutputKind):
        _fail("output_kind", p.output_kind, "a RequestOutputKind")
    _check_collections(p)


def _check_numbers(p: SamplingParams) -> None:
    for name in _INTS + _OPTIONAL_INTS:
        value = getattr(p, name)
        if not _is_int(value) and not (value is None and name in _OPTIONAL_INTS):
            _fail(name, value, "an integer" + (" or None" if name in _OPTIONAL_INTS else ""))
    for name in _FLOATS:
        value = getattr(p, name)
        if not _is_number(value) or not math.isfinite(value):
            _fail(name, value, "a finite number")


def _check_collections(p: SamplingParams) -> None:
    for name in ("stop_token_ids", "allowed_token_ids"):
        ids = getattr(p, name)
        if ids is not None and not (_is_list(ids) and all(_is_int(i) and i >= 0 for i in ids)):
            _fail(name, ids, "a list of token ids (integers >= 0)")
    for name in ("stop", "bad_words"):
        words = getattr(p, name)
        if name == "stop" and isinstance(words, str):
            words = [words]
        if words is not None and not (_is_list(words) and all(isinstance(w, str) and w for w in words)):
            _fail(name, getattr(p, name), "a list of non-empty strings")
    if p.logit_bias is not None:
        pairs = p.logit_bias.items() if isinstance(p.logit_bias, Mapping) else [(None, None)]
        if not all(_is_int(t) and t >= 0 and _is_number(b) and -100 <= b <= 100 for t, b in pairs):
            _fail("logit_bias", p.logit_bias, "a dict from token id to a number in [-100, 100]")


def _check_ranges(p: SamplingParams) -> None:
    rules: tuple[tuple[str, bool, str], ...] = (
        ("n", p.n >= 1, "at least 1"),
        ("presence_penalty", -2 <= p.presence_penalty <= 2, "in [-2, 2]"),
        ("frequency_penalty", -2 <= p.frequency_penalty <= 2, "in [-2, 2]"),
        ("repetition_penalty", 1e-4 <= p.repetition_penalty <= 1e4, "in [0.0001, 10000] (1 is none)"),
        ("temperature", 0 <= p.temperature <= 1e4, "in [0, 10000] (0 is greedy)"),
        ("top_p", 0 < p.top_p <= 1, "in (0, 1]"),
        ("top_k", p.top_k >= -1, "0 or -1 (all tokens) or at least 1"),
        ("min_p", 0 <= p.min_p <= 1, "in [0, 1]"),
        ("max_tokens", p.max_tokens is None or p.max_tokens >= 1, "at least 1, or None"),
        ("min_tokens", p.min_tokens >= 0, "at least 0"),
        ("logprobs", p.logprobs is None or p.logprobs >= -1, "at least 0, -1 (all) or None"),
        (
            "prompt_logprobs",
            p.prompt_logprobs is None or p.prompt_logprobs >= -1,
            "at least 0, -1 (all) or None",
        ),
        (
            "allowed_token_ids",
            p.allowed_token_ids is None or len(p.allowed_token_ids) > 0,
            "not empty",
        ),
    )
    for name, holds, must in rules:
        if not holds:
            _fail(name, getattr(p, name), must)


def _check_contradictions(p: SamplingParams) -> None:
    if p.max_tokens is not None and p.min_tokens > p.max_tokens:
        raise RequestError(
            f"min_tokens={p.min_tokens} is greater than max_tokens={p.max_tokens}; "
            "lower min_tokens or raise max_tokens"
        )
    if p.greedy and p.n > 1:
        raise RequestError(
            f"n={p.n} with temperature=0 would give {p.n} equal completions; use n=1 or a temperature above 0"
        )
    if p.stop_strings and not p.detokenize:
        raise RequestError(
            f"stop={list(p.stop_strings)!r} needs the text, but detokenize=False leaves it out; "
            "set detokenize=True or use stop_token_ids"
        )
    if p.skip_reading_prefix_cache is False and p.prompt_logprobs is not None:
        raise RequestError(
            "skip_reading_prefix_cache=False contradicts prompt_logprobs: tokens read from the prefix "
            "cache have no log-probabilities; leave skip_reading_prefix_cache unset"
        )
