"""What a step's result says about one sequence."""

from halimede.scheduler.output import ModelRunnerOutput, ScheduledSequence, SequenceUpdate, TokenLogprobs
from halimede.scheduler.sequence import Sequence


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
    fresh = entries[max(0, sequence.num_prompt_logprobs - row.num_computed_tokens) :]
    sequence.num_prompt_logprobs += len(fresh)
    return fresh
