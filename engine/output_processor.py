"""Updates of the core in, what the user sees out: text, stop strings, log-probabilities, n completions."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from halimede.engine.input_processor import ProcessedRequest
from halimede.engine.outputs import (
    CompletionOutput,
    Logprob,
    PositionLogprobs,
    RequestMetrics,
    RequestOutput,
)
from halimede.engine.stop_strings import StopStrings
from halimede.engine.tokenizer import IncrementalDetokenizer
from halimede.errors import RequestError
from halimede.scheduler.output import FinishReason, SequenceUpdate, TokenLogprobs
from halimede.scheduler.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class _Completion:
    """One of a request's n completions, as it grows."""

    index: int
    detokenizer: IncrementalDetokenizer | None
    stop: StopStrings
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    # How much of the above a DELTA stream has shown already.
    shown_tokens: int = 0
    shown_end: bool = False

    @property
    def has_news(self) -> bool:
        """Whether a DELTA stream has something to show."""
        return self.shown_tokens < len(self.token_ids) or (
            self.finish_reason is not None and not self.shown_end
        )


@dataclass(slots=True)
class _RequestState:
    """A request as it grows. num_unfinished: completions that go on.

    streams: it has outputs before its end; delta: they hold what is new only.

    prompt_token_ids: the list that its outputs share, since a copy for each would cost its length every step.
    """

    source: ProcessedRequest
    completions: list[_Completion]
    metrics: RequestMetrics
    prompt_logprobs: list[PositionLogprobs | None] | None
    prompt_token_ids: list[int]
    num_unfinished: int
    streams: bool
    delta: bool
    num_cached_tokens: int = 0
    error: RequestError | None = None

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return not self.num_unfinished


@dataclass(slots=True)
class ProcessedOutputs:
    """What one step gives: outputs to show, and ids of core requests that a stop string has ended."""

    outputs: list[RequestOutput] = field(default_factory=list)
    to_abort: list[str] = field(default_factory=list)


class OutputProcessor:
    """Keeps the state of each running request and turns updates into RequestOutputs."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None") -> None:
        self._tokenizer = tokenizer
        self._states: dict[str, _RequestState] = {}
        self._owners: dict[str, tuple[_RequestState, _Completion]] = {}
        self._token_texts: dict[int, str] = {}

    def add(self, source: ProcessedRequest) -> None:
        """Expect updates for a request."""
        params = source.sampling_params
        state = _RequestState(
            source,
            [],
            RequestMetrics(arrival_time=source.requests[0].arrival_time),
            None if params.prompt_logprobs is None else [None],
            list(source.prompt_token_ids),
            num_unfinished=len(source.requests),
            streams=params.output_kind is not RequestOutputKind.FINAL_ONLY,
            delta=params.output_kind is RequestOutputKind.DELTA,
        )
        for index, request in enumerate(source.requests):
            detokenizer = None
            if params.detokenize and self._tokenizer is not None:
                detokenizer = IncrementalDetokenizer(
                    self._tokenizer,
                    source.prompt_token_ids,
                    skip_special_tokens=params.skip_special_tokens,
                )
            stop = StopStrings(params.stop_strings, keep=params.include_stop_str_in_output)
            completion = _Completion(index, detokenizer, stop)
            state.completions.append(completion)
            self._owners[request.request_id] = (state, completion)
        self._states[source.request_id] = state

    def forget(self, request_id: str) -> list[str]:
        """Drop a request; the ids of its core requests that are still running."""
        state = self._states.pop(request_id, None)
        if state is None:
            return []
        requests = state.source.requests
        running = [
            r.request_id
            for r, completion in zip(requests, state.completions, strict=True)
            if completion.finish_reason is None
        ]
        for request in requests:
            self._owners.pop(request.request_id, None)
        return running

    def process(self, updates: Iterable[SequenceUpdate]) -> ProcessedOutputs:
        """Apply a step's updates. Updates of forgotten requests are ignored."""
        result = ProcessedOutputs()
        changed: dict[str, _RequestState] = {}
        for update in updates:
            owner = self._owners.get(update.request_id)
            if owner is None:
                continue
            state, completion = owner
            if completion.finish_reason is None and self._apply(state, completion, update):
                result.to_abort.append(update.request_id)
            if state.streams or state.finished:
                changed[state.source.request_id] = state
        for request_id, state in changed.items():
            output = _make_output(state)
            if output is not None:
                result.outputs.append(output)
            if state.finished:
                self.forget(request_id)
        return result

    def _apply(self, state: _RequestState, completion: _Completion, update: SequenceUpdate) -> bool:
        """True if a stop string ended a completion that the core still runs."""
        if completion.index == 0:  # the others read the prompt that the first one computed
            state.num_cached_tokens = update.num_cached_tokens
            if state.prompt_logprobs is not None:
                state.prompt_logprobs += [self._decode_logprobs(entry) for entry in update.prompt_logprobs]
        if state.metrics.first_token_time is None and update.new_token_ids:
            state.metrics.first_token_time = time.monotonic()
        stopped_by = self._append(completion, update, state.source.sampling_params)
        if stopped_by is None and update.finish_reason is None:
            return False
        completion.finish_reason, completion.stop_reason = update.finish_reason, update.stop_reason
        if update.error is not None:
            state.error = RequestError(f"request {state.source.request_id} failed: {update.error}")
        if stopped_by is not None:
            completion.finish_reason, completion.stop_reason = "stop", stopped_by
        elif completion.detokenizer is not None:
            completion.stop.add(completion.detokenizer.flush(), check=False)
        state.num_unfinished -= 1
        if state.finished:
            state.metrics.finished_time = time.monotonic()
        return stopped_by is not None and update.finish_reason is None

    def _append(self, completion: _Completion, update: SequenceUpdate, params: SamplingParams) -> str | None:
        """Add the update's tokens; the stop string that ends the completion, if one does."""
        detokenizer = completion.detokenizer
        if detokenizer is None and not update.logprobs:
            completion.token_ids += update.new_token_ids
            return None
        last = len(update.new_token_ids) - 1
        for position, token in enumerate(update.new_token_ids):
            completion.token_ids.append(token)
            if update.logprobs:
                entry = update.logprobs[position]
                completion.logprobs.append(self._decode_logprobs(entry))
                completion.cumulative_logprob += entry.logprobs[0]
            if detokenizer is None:
                continue
            if position == last and update.finish_reason == "stop" and not params.include_stop_str_in_output:
                continue  # the token that ended it is not part of the text
            check = len(completion.token_ids) > params.min_tokens
            found = completion.stop.add(detokenizer.add(token), check=check)
            if found is not None:
                return found
        return None

    def _decode_logprobs(self, entry: TokenLogprobs) -> PositionLogprobs:
        decoded: PositionLogprobs = {}
        for token, logprob, rank in zip(entry.token_ids, entry.logprobs, entry.ranks, strict=True):
            if token not in decoded:  # the sampled token comes first and may be among the top ones again
                decoded[token] = Logprob(logprob, rank, self._token_text(token))
        return decoded

    def _token_text(self, token: int) -> str | None:
        if self._tokenizer is None:
            return None
        if token not in self._token_texts:
            self._token_texts[token] = str(self._tokenizer.decode([token]))
        return self._token_texts[token]


def _make_output(state: _RequestState) -> RequestOutput | None:
    source, finished = state.source, state.finished
    shown, delta = state.completions, state.delta
    if delta:
        shown = [completion for completion in shown if completion.has_news]
        if not shown and not finished:
            return None
    with_logprobs = source.sampling_params.logprobs is not None
    return RequestOutput(
        source.request_id,
        source.prompt,
        state.prompt_token_ids,
        [_show(completion, delta, with_logprobs) for completion in shown],
        finished,
        None if state.prompt_logprobs is None else _show_prompt_logprobs(state, delta),
        state.metrics,
        state.num_cached_tokens,
        state.error,
    )


def _show_prompt_logprobs(state: _RequestState, delta: bool) -> list[PositionLogprobs | None]:
    shown = state.prompt_logprobs or []
    if delta:
        state.prompt_logprobs = []
    return list(shown)


def _show(completion: _Completion, delta: bool, with_logprobs: bool) -> CompletionOutput:
    ended = completion.finish_reason is not None
    first_token = 0
    if delta:
        text = completion.stop.take(everything=ended)
        first_token, completion.shown_tokens = completion.shown_tokens, len(completion.token_ids)
        completion.shown_end = ended
    else:
        text = completion.stop.text if ended else completion.stop.safe_text
    return CompletionOutput(
        completion.index,
        text,
        completion.token_ids[first_token:],
        completion.cumulative_logprob if with_logprobs else None,
        completion.logprobs[first_token:] if with_logprobs else None,
        completion.finish_reason,
        completion.stop_reason,
    )
