"""One completion to generate, as the engine core receives it: token ids and settings, never text."""

from dataclasses import dataclass

from halimede.scheduler.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Request:
    """One completion of one prompt. A prompt with n > 1 completions is n of these.

    seed: key of the request's random stream; with the position it fixes each draw, whatever the batch.
    arrival_time: seconds, for ordering only.
    priority: lower runs first under the "priority" policy.
    cache_salt: requests share prefix-cache blocks only when their salts are equal.
    eos_token_ids: end-of-sequence tokens that end the completion (empty with ignore_eos).
    bad_words_token_ids: sampling_params.bad_words as token sequences.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling_params: SamplingParams
    seed: int
    arrival_time: float
    priority: int = 0
    cache_salt: str | None = None
    eos_token_ids: frozenset[int] = frozenset()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Every token that ends the completion: end-of-sequence and stop_token_ids."""
        return self.eos_token_ids.union(self.sampling_params.stop_token_ids or ())
