"""What passes between the scheduler and whoever executes a step: integers and floats, never tensors."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from halimede.scheduler.request import Request

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class NewSequence:
    """All that the runner must know of a sequence it has not seen, or forgot when it was preempted.

    token_ids: every known token, prompt first; num_prompt_tokens of them are the prompt.
    """

    request: Request
    token_ids: tuple[int, ...]
    num_prompt_tokens: int


class ScheduledSequence(NamedTuple):
    """One sequence's share of a step (a named tuple: a step makes one per sequence, and it must be cheap).

    num_tokens: how many of its tokens to run. Which ones they are the runner knows: those of `new`, and after
        them those that it sampled itself, perhaps in a step that is still running.
    num_computed_tokens: the position of the first of them; None for a row that goes on where it was with the
        one token that it sampled last, and is therefore the same at every step.
    new_block_ids: blocks to append to the sequence's block table (all of them if `new` is given).
    needs_sample: the last token to run is the last known one, so its logits give the next token.
    new: given the first time the runner sees the sequence, and again after each preemption.
    """

    seq_id: int
    num_tokens: int
    num_computed_tokens: int | None
    new_block_ids: tuple[int, ...]
    needs_sample: bool
    new: NewSequence | None = None


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step: what to run, and which sequences to forget first.

    finished_seq_ids never come back. preempted_seq_ids come back, with `new`, in this step or later. After a
    step that failed both are named again, so forgetting an unknown sequence must do nothing.
    With nothing scheduled it still names sequences to forget, and they are not named again.
    """

    step: int
    scheduled: tuple[ScheduledSequence, ...]
    finished_seq_ids: tuple[int, ...] = ()
    preempted_seq_ids: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that the step runs."""
        return sum(s.num_tokens for s in self.scheduled)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: the position's own token first, then the most probable ones.

    ranks: 1 for the most probable token of the vocabulary.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelRunnerOutput:
    """What a step produced, by seq_id.

    sampled_token_ids: the new tokens of each sequence with needs_sample (more than one with speculation).
    logprobs: one entry per sampled token, for sequences that asked.
    prompt_logprobs: for sequences that asked, one entry per prompt token *predicted* in this step: running
        the prompt tokens at positions a .. b-1 predicts the prompt tokens at positions a+1 .. b.
    errors: sequences that failed (their logits were not finite, say), with the reason.
    """

    sampled_token_ids: dict[int, tuple[int, ...]]
    logprobs: dict[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


class SequenceUpdate(NamedTuple):
    """What a step changed for one request (a named tuple, like ScheduledSequence).

    finish_reason: None while it goes on. stop_reason: the stop token that ended it, None for the
    end-of-sequence token. num_cached_tokens: prompt tokens that the prefix cache spared.
    """

    request_id: str
    new_token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: str | None = None
