"""What comes into the scheduler: requests, and what a step's result says about one sequence."""

from halimede.errors import RequestError
from halimede.scheduler.config import SchedulerConfig
from halimede.scheduler.output import ModelRunnerOutput, ScheduledSequence, SequenceUpdate, TokenLogprobs
from halimede.scheduler.request import Request
from halimede.scheduler.sequence import Sequence


def check_request(request: Request, config: SchedulerConfig) -> None:
    """Raise RequestError for a request that can never run."""
    length, name = len(request.prompt_token_ids), f"request {request.request_id!r}"
    if length == 0:
        raise RequestError(f"{name} has an empty prompt; give at least one token")
    if length >= config.max_model_len:
        raise RequestError(
            f"the prompt of {name} has {length} tokens, but prompt and completion together are limited "
            f"to max_model_len={config.max_model_len}; shorten the prompt or raise max_model_len"
        )
    if not config.enable_chunked_prefill and length > config.max_num_batched_tokens:
        raise RequestError(
            f"the prompt of {name} has {length} tokens, and enable_chunked_prefill=False keeps it whole, "
            f"but a step runs max_num_batched_tokens={config.max_num_batched_tokens}; shorten it, raise "
            "max_num_batched_tokens or set enable_chunked_prefill=True"
        )


def take_in(sequence: Sequence, row: ScheduledSequence, result: ModelRunnerOutput) -> SequenceUpdate | None:
    """Give a sequence what its row of a step produced; None when nothing changed for the request.

    The caller ends the sequence when the update has a finish_reason.
    """
    error = result.errors.get(row.seq_id)
    sampled = tuple(result.sampled_token_ids.get(row.seq_id, ()))
    if error is None and row.needs_sample and not sampled:
        error = "the model runner returned no token for a sequence that needs one"
    if error is not None:
        return SequenceUpdate(
            sequence.request_id,
            num_cached_tokens=sequence.num_cached_tokens,
            finish_reason="error",
            error=error,
        )
    prompt_logprobs = _new_prompt_logprobs(sequence, row, result)
    count, finish_reason, stop_reason = sequence.append(sampled)
    if not count and not prompt_logprobs:
        return None
    return SequenceUpdate(
        sequence.request_id,
        sampled[:count],
        result.logprobs.get(row.seq_id, ())[:count],
        prompt_logprobs,
        sequence.num_cached_tokens,
        finish_reason,
        stop_reason,
    )


def _new_prompt_logprobs(
    sequence: Sequence, row: ScheduledSequence, result: ModelRunnerOutput
) -> tuple[TokenLogprobs, ...]:
    """The row's prompt logprobs, without those already reported before a preemption."""
    entries = result.prompt_logprobs.get(row.seq_id, ())
    fresh = entries[max(0, sequence.num_prompt_logprobs - (row.num_computed_tokens or 0)) :]
    sequence.num_prompt_logprobs += len(fresh)
    return fresh
