"""One request while it is served: its tokens, its blocks and how far it got. Private to the scheduler."""

import sys
from collections.abc import Sequence as Tokens

from halimede.scheduler.output import FinishReason, ScheduledSequence
from halimede.scheduler.prefix_cache import Parent
from halimede.scheduler.request import Request

NEVER = sys.maxsize
"""Position that no sequence reaches."""

SchedulingKey = tuple[int, float, int]
"""Order of sequences, smallest first: rank, arrival, seq_id (which makes it unique)."""


class Sequence:
    """The state of one request.

    key: its place among the others; rank, the key's first part: who may push out whom.
    token_ids: every known token, prompt first. num_pending_tokens: those after them that steps in flight
        sample. num_computed_tokens: those, of both, whose keys and values are in the cache once the steps
        scheduled so far have run.
    num_cached_tokens: prompt tokens that the prefix cache spared when it was first scheduled.
    block_table: its blocks in order; capacity: the tokens they hold.
    parent: identity of the last block registered in the prefix cache; num_registered_blocks of the table are
        registered or came from there, num_shared_blocks of them came from there; register_at is the number
        of computed tokens that fills the next one.
    blocks_wanted: free blocks that the last attempt to start it asked for in vain; retry_step: step from
        which its prefix is looked up again even if they are not free (more of it may be cached by then).
    max_num_tokens: length of prompt and completion together that ends it; last_length: one token less.
    plain_row: its share of a step that runs its last token and changes nothing else, as it does while it has
        no more than plain_until computed tokens.
    """

    __slots__ = (
        "block_table",
        "blocks_wanted",
        "capacity",
        "is_running",
        "key",
        "last_length",
        "max_num_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_pending_tokens",
        "num_prompt_logprobs",
        "num_prompt_tokens",
        "num_registered_blocks",
        "num_shared_blocks",
        "parent",
        "plain_row",
        "plain_until",
        "rank",
        "register_at",
        "request",
        "request_id",
        "retry_step",
        "seq_id",
        "stop_token_ids",
        "token_ids",
        "was_scheduled",
    )

    def __init__(self, seq_id: int, request: Request, key: SchedulingKey, max_model_len: int) -> None:
        max_tokens = request.sampling_params.max_tokens
        self.seq_id = seq_id
        self.request = request
        self.request_id = request.request_id
        self.key = key
        self.rank = key[0]
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_pending_tokens = 0
        self.num_cached_tokens = 0
        self.num_prompt_logprobs = 0
        self.was_scheduled = False
        self.is_running = False
        self.stop_token_ids = request.stop_token_ids
        self.max_num_tokens = max_model_len
        if max_tokens is not None:
            self.max_num_tokens = min(max_model_len, self.num_prompt_tokens + max_tokens)
        self.last_length = self.max_num_tokens - 1
        self.plain_row = ScheduledSequence(seq_id, 1, None, (), True)
        self.forget_blocks()

    def forget_blocks(self) -> None:
        """Go back to the state in which nothing is computed and no block is held; tokens stay known."""
        self.num_computed_tokens = 0
        self.block_table: list[int] = []
        self.capacity = 0
        self.parent: Parent = self.request.cache_salt
        self.num_registered_blocks = 0
        self.num_shared_blocks = 0
        self.register_at = NEVER
        self.plain_until = 0
        self.blocks_wanted = 0
        self.retry_step = 0

    def settle(self, *, decoding: bool) -> None:
        """Work out plain_until. decoding: all tokens, known and pending, but the last one are computed."""
        self.plain_until = min(self.capacity, self.last_length) if decoding else 0

    def append(self, token_ids: Tokens[int]) -> tuple[int, FinishReason | None, int | None]:
        """Append sampled tokens up to the one that ends the sequence.

        Returns how many were taken, then finish_reason and stop_reason as SequenceUpdate has them.
        """
        params = self.request.sampling_params
        min_num_tokens = self.num_prompt_tokens + params.min_tokens
        for count, token_id in enumerate(token_ids, 1):
            self.token_ids.append(token_id)
            num_tokens = len(self.token_ids)
            if token_id in self.stop_token_ids and num_tokens >= min_num_tokens:
                return count, "stop", None if token_id in self.request.eos_token_ids else token_id
            if num_tokens >= self.max_num_tokens:
                return count, "length", None
        return len(token_ids), None, None
