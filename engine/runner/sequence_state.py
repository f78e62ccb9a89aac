"""What the runner keeps of each sequence between steps."""

import numpy as np
import numpy.typing as npt
import torch

from halimede.scheduler.output import NewSequence


class TokenCounts:
    """How often each token occurs, kept up to date token by token, for the penalties.

    seen (V) bool: in the prompt or the output. output (V) int32: occurrences in the output.
    """

    __slots__ = ("output", "seen")

    def __init__(self, token_ids: list[int], num_prompt_tokens: int, vocab_size: int, device: torch.device):
        tokens = torch.tensor(token_ids, dtype=torch.int64)
        counts = torch.bincount(tokens[num_prompt_tokens:], minlength=vocab_size)
        self.output = counts.to(device, torch.int32)
        self.seen = (torch.bincount(tokens, minlength=vocab_size) > 0).to(device)

    def add(self, token_id: int) -> None:
        """Count one more generated token."""
        self.output[token_id] += 1
        self.seen[token_id] = True


class SequenceState:
    """One sequence: its tokens, its blocks, and what its sampling parameters need.

    token_ids: every known token, prompt first.
    counts: None unless the request uses a penalty.
    forbidden (V) bool: tokens outside allowed_token_ids; None without that setting.
    """

    __slots__ = ("_blocks", "_num_blocks", "counts", "forbidden", "num_prompt_tokens", "request", "token_ids")

    def __init__(self, new: NewSequence, *, vocab_size: int, device: torch.device) -> None:
        params = new.request.sampling_params
        self.request = new.request
        self.token_ids = list(new.token_ids)
        self.num_prompt_tokens = new.num_prompt_tokens
        self._blocks: npt.NDArray[np.int32] = np.zeros(16, dtype=np.int32)
        self._num_blocks = 0
        self.counts: TokenCounts | None = None
        if params.repetition_penalty != 1.0 or params.frequency_penalty or params.presence_penalty:
            self.counts = TokenCounts(self.token_ids, self.num_prompt_tokens, vocab_size, device)
        self.forbidden: torch.Tensor | None = None
        if params.allowed_token_ids is not None:
            allowed = [token for token in params.allowed_token_ids if token < vocab_size]
            forbidden = torch.ones(vocab_size, dtype=torch.bool)
            forbidden[allowed] = False
            self.forbidden = forbidden.to(device)

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def block_ids(self) -> npt.NDArray[np.int32]:
        """The block table, in order."""
        return self._blocks[: self._num_blocks]

    def append_blocks(self, block_ids: tuple[int, ...]) -> None:
        """Add blocks at the end of the block table."""
        end = self._num_blocks + len(block_ids)
        if end > len(self._blocks):
            grown = np.zeros(max(end, 2 * len(self._blocks)), dtype=np.int32)
            grown[: self._num_blocks] = self.block_ids
            self._blocks = grown
        self._blocks[self._num_blocks : end] = block_ids
        self._num_blocks = end

    def append_token(self, token_id: int) -> None:
        """Add one generated token."""
        self.token_ids.append(token_id)
        if self.counts is not None:
            self.counts.add(token_id)

    def banned_token_ids(self) -> list[int]:
        """Tokens that may not come next: the ends of bad words, and stop tokens until min_tokens."""
        banned: list[int] = []
        if self.num_output_tokens < self.request.sampling_params.min_tokens:
            banned += self.request.stop_token_ids
        for word in self.request.bad_words_token_ids:
            head = list(word[:-1])
            if not head or (len(head) <= self.num_output_tokens and self.token_ids[-len(head) :] == head):
                banned.append(word[-1])
        return banned
