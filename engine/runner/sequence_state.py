"""What the runner keeps of each sequence between steps."""

import numpy as np
import numpy.typing as npt
import torch

from halimede.scheduler.output import NewSequence


class TokenCounts:
    """How often each token that a penalty may touch occurs, kept up to date token by token.

    Only tokens that occur are kept: they are few beside the vocabulary.
    """

    __slots__ = ("_counts", "_index", "_tokens")

    def __init__(self, prompt: list[int], output: list[int]) -> None:
        tokens, places = np.unique(np.array(prompt + output, dtype=np.int64), return_inverse=True)
        output_counts = np.bincount(places[len(prompt) :], minlength=len(tokens))
        self._index = {int(token): place for place, token in enumerate(tokens)}
        self._tokens: npt.NDArray[np.int64] = tokens
        self._counts: npt.NDArray[np.int32] = output_counts.astype(np.int32)

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        """The different tokens that occur."""
        return self._tokens[: len(self._index)]

    @property
    def output_counts(self) -> npt.NDArray[np.int32]:
        """How often each of them occurs in the output."""
        return self._counts[: len(self._index)]

    def add(self, token_id: int) -> None:
        """Count one more generated token."""
        place = self._index.setdefault(token_id, len(self._index))
        if place == len(self._tokens):
            room = 16 + len(self._tokens)
            self._tokens = np.concatenate([self._tokens, np.zeros(room, dtype=np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(room, dtype=np.int32)])
        self._tokens[place] = token_id
        self._counts[place] += 1


class SequenceState:
    """One sequence: its tokens and what its sampling parameters need.

    token_ids: every token that was known when the runner was told of it, prompt first; tokens: the same as
    int32 (L). The tokens after them are added only if `follows_tokens`: for others nobody asks.
    counts: None unless the request uses a penalty.
    forbidden (V) bool: tokens outside allowed_token_ids; None without that setting.
    """

    __slots__ = (
        "counts",
        "follows_tokens",
        "forbidden",
        "num_prompt_tokens",
        "request",
        "seq_id",
        "token_ids",
        "tokens",
    )

    def __init__(self, seq_id: int, new: NewSequence, *, vocab_size: int) -> None:
        params = new.request.sampling_params
        self.seq_id = seq_id
        self.request = new.request
        self.token_ids = list(new.token_ids)
        self.tokens: npt.NDArray[np.int32] = np.array(new.token_ids, dtype=np.int32)
        self.num_prompt_tokens = new.num_prompt_tokens
        self.counts: TokenCounts | None = None
        if params.repetition_penalty != 1.0 or params.frequency_penalty or params.presence_penalty:
            # The other two penalties do not look at the prompt.
            prompt = self.token_ids[: self.num_prompt_tokens] if params.repetition_penalty != 1.0 else []
            self.counts = TokenCounts(prompt, self.token_ids[self.num_prompt_tokens :])
        self.follows_tokens = self.counts is not None or any(
            len(word) > 1 for word in new.request.bad_words_token_ids
        )
        self.forbidden: torch.Tensor | None = None
        if params.allowed_token_ids is not None:
            allowed = [token for token in params.allowed_token_ids if token < vocab_size]
            self.forbidden = torch.ones(vocab_size, dtype=torch.bool)
            self.forbidden[allowed] = False

    def append_token(self, token_id: int) -> None:
        """Add one generated token."""
        self.token_ids.append(token_id)
        if self.counts is not None:
            self.counts.add(token_id)

    def banned_token_ids(self, num_tokens: int) -> list[int]:
        """Tokens that may not come after num_tokens tokens: the ends of bad words, and stop tokens until
        min_tokens."""
        banned: list[int] = []
        num_output_tokens = num_tokens - self.num_prompt_tokens
        if num_output_tokens < self.request.sampling_params.min_tokens:
            banned += self.request.stop_token_ids
        for word in self.request.bad_words_token_ids:
            head = list(word[:-1])
            if not head or (len(head) <= num_output_tokens and self.token_ids[-len(head) :] == head):
                banned.append(word[-1])
        return banned
