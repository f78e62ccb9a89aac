"""What a user gets back; field names are vLLM's."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from halimede.errors import RequestError
from halimede.scheduler.output import FinishReason


@dataclass(slots=True)
class Logprob:
    """One token's log-probability. rank: 1 for the most probable token of the vocabulary."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]
"""Token id to its log-probability, at one position."""


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt.

    text: the completion; with RequestOutputKind.DELTA only what is new (token_ids and logprobs likewise).
    cumulative_logprob: sum over the sampled tokens, None unless logprobs were asked for.
    finish_reason: "stop", "length", "abort" or "error"; None while it goes on.
    stop_reason: the stop string or stop token id that ended it, None for the end-of-sequence token.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request in seconds of time.monotonic(); None while they have not happened."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """The state or the result of one request.

    prompt: None when token ids were given. prompt_logprobs: one entry per prompt token, the first None.
    num_cached_tokens: prompt tokens that the prefix cache spared.
    error: why the request failed, if it did; its completions then have finish_reason "error".
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int | None = None
    error: RequestError | None = field(default=None, compare=False)
