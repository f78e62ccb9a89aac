"""An executor without a model, for tests of everything above it. Imports no torch.

Its KV cache is real in the sense that matters: the cell of a token holds a digest of the token and all tokens
before it, as keys and values do, read through the block table that it was sent. The next token is computed
from the cells alone. So a wrong token, a wrong block, a stale cell or a block that somebody else overwrote
changes what comes out, and `fake_next_token` says what should have come out.
"""

from collections import deque
from collections.abc import Sequence
from random import Random

from halimede.errors import ConfigError, EngineDeadError
from halimede.scheduler.output import (
    ModelRunnerOutput,
    ScheduledSequence,
    SchedulerOutput,
    TokenLogprobs,
)

_EMPTY = -1
_MODULUS = (1 << 61) - 1


def fake_next_token(token_ids: Sequence[int], vocab_size: int) -> int:
    """The token that FakeExecutor gives after exactly these tokens."""
    cells, digest = [], 0
    for token in token_ids:
        digest = _extend(digest, token)
        cells.append(digest)
    return _next_token(cells, vocab_size)


def _extend(digest: int, token: int) -> int:
    """The cell of a token that follows a cell with this digest."""
    return (digest * 1_000_003 + token + 1) % _MODULUS


def _next_token(cells: Sequence[int], vocab_size: int) -> int:
    # Hashes of tuples of integers are the same in every process. Multiplying spreads them over small ranges.
    return (hash(tuple(cells)) * 0x9E3779B97F4A7C15 % (1 << 64) >> 32) % vocab_size


class FakeExecutor:
    """Deterministic tokens that depend only on a sequence's tokens so far.

    Log-probabilities are made up but well formed: token t has -(1 + t % 7). `steps` are the outputs it ran.

    max_steps_in_flight above 1 makes it a device with a queue: a launched step is run later, at a moment that
    `timing` decides, but no later than it is collected; what the host has launched or freed meanwhile must
    not matter.
    """

    def __init__(
        self,
        num_blocks: int,
        vocab_size: int,
        max_model_len: int,
        block_size: int = 16,
        *,
        max_steps_in_flight: int = 1,
        timing: Random | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.max_model_len = max_model_len
        self.max_steps_in_flight = max_steps_in_flight
        self.kernel_counters = None
        self.steps: list[SchedulerOutput] = []
        self._vocab_size = vocab_size
        self._block_size = block_size
        self._blocks = [[_EMPTY] * block_size for _ in range(num_blocks)]
        self._states: dict[int, _State] | None = {}
        self._timing = timing
        self._launched: deque[SchedulerOutput] = deque()  # not yet run
        self._results: deque[ModelRunnerOutput] = deque()  # not yet collected

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Launch a step and collect it, with none in flight."""
        self.launch(output)
        return self.collect()

    def launch(self, output: SchedulerOutput) -> None:
        """See Executor.launch. EngineDeadError after shutdown; AssertionError for an output that makes no
        sense, here or when it is collected."""
        if self._states is None:
            raise EngineDeadError("the engine has been shut down; make a new one")
        assert len(self._launched) + len(self._results) < self.max_steps_in_flight, "too many steps in flight"
        self.steps.append(output)
        self._launched.append(output)
        self._run(len(self._launched) if self.max_steps_in_flight == 1 else self._some())

    def collect(self) -> ModelRunnerOutput:
        """See Executor.collect."""
        if self._states is None:
            raise EngineDeadError("the engine has been shut down; make a new one")
        if not self._results:
            self._run(1)
        result = self._results.popleft()
        self._run(self._some())
        return result

    def abandon(self) -> None:
        """See Executor.abandon."""
        self._run(len(self._launched))
        self._results.clear()

    def _some(self) -> int:
        """How many of the waiting steps the device gets done by now."""
        return 0 if self._timing is None else self._timing.randint(0, len(self._launched))

    def _run(self, count: int) -> None:
        for _ in range(count):
            self._results.append(self._run_step(self._launched.popleft()))

    def _run_step(self, output: SchedulerOutput) -> ModelRunnerOutput:
        assert self._states is not None
        for seq_id in (*output.finished_seq_ids, *output.preempted_seq_ids):
            self._states.pop(seq_id, None)
        seq_ids = [s.seq_id for s in output.scheduled]
        assert len(set(seq_ids)) == len(seq_ids), "a sequence is scheduled twice in a step"
        result = ModelRunnerOutput({})
        # All cells are written before any is read, as one forward pass does.
        for scheduled in output.scheduled:
            self._write(self._update_state(scheduled), scheduled)
        for scheduled in output.scheduled:
            self._answer(self._states[scheduled.seq_id], scheduled, result)
        return result

    def start_profile(self, folder: str) -> None:
        """See Executor.start_profile."""
        raise ConfigError(f"profile={folder!r}: an executor without a model has nothing to record")

    def stop_profile(self) -> str:
        """See Executor.stop_profile."""
        raise ConfigError("no profile is being recorded; call start_profile first")

    def shutdown(self) -> None:
        """Forget everything."""
        self._states = None
        self._launched.clear()
        self._results.clear()

    def _update_state(self, scheduled: ScheduledSequence) -> "_State":
        assert self._states is not None
        if scheduled.new is not None:
            self._states[scheduled.seq_id] = _State(scheduled)
        assert scheduled.seq_id in self._states, f"sequence {scheduled.seq_id} was never introduced"
        state = self._states[scheduled.seq_id]
        for block_id in scheduled.new_block_ids:
            assert 0 < block_id < self.num_blocks, f"block {block_id} may not be handed out"
        state.block_ids += scheduled.new_block_ids
        return state

    def _write(self, state: "_State", scheduled: ScheduledSequence) -> None:
        start = state.num_computed_tokens
        end = start + scheduled.num_tokens
        assert start < end <= len(state.token_ids), f"tokens {start}..{end} of {len(state.token_ids)}"
        assert scheduled.num_computed_tokens in (None, start), "tokens are left out or run twice"
        state.num_computed_tokens = end
        assert end <= len(state.block_ids) * self._block_size, "too few blocks for the tokens"
        assert scheduled.needs_sample == (end == len(state.token_ids)), "needs_sample is wrong"
        digest = self._cell(state, start - 1) if start else 0
        for position, token in enumerate(state.token_ids[start:end], start):
            digest = _extend(digest, token)
            self._blocks[state.block_ids[position // self._block_size]][position % self._block_size] = digest

    def _cell(self, state: "_State", position: int) -> int:
        return self._blocks[state.block_ids[position // self._block_size]][position % self._block_size]

    def _answer(self, state: "_State", scheduled: ScheduledSequence, result: ModelRunnerOutput) -> None:
        params = state.request.sampling_params
        first = state.num_computed_tokens - scheduled.num_tokens + 1
        end = min(first + scheduled.num_tokens, state.num_prompt_tokens)
        targets = state.token_ids[first:end]
        if params.prompt_logprobs is not None and targets:
            entries = tuple(self._logprobs(token, params.prompt_logprobs) for token in targets)
            result.prompt_logprobs[scheduled.seq_id] = entries
        if not scheduled.needs_sample:
            return
        cells: list[int] = []
        for block_id in state.block_ids:
            cells += self._blocks[block_id]
        token = _next_token(cells[: len(state.token_ids)], self._vocab_size)
        state.token_ids.append(token)
        result.sampled_token_ids[scheduled.seq_id] = (token,)
        if params.logprobs is not None:
            result.logprobs[scheduled.seq_id] = (self._logprobs(token, params.logprobs),)

    def _logprobs(self, token: int, count: int) -> TokenLogprobs:
        top = range(self._vocab_size if count == -1 else min(count, self._vocab_size))
        token_ids = (token, *top)
        return TokenLogprobs(
            token_ids, tuple(-(1.0 + t % 7) for t in token_ids), (token + 1, *(t + 1 for t in top))
        )


class _State:
    """A sequence: its tokens and its block table."""

    def __init__(self, scheduled: ScheduledSequence) -> None:
        assert scheduled.new is not None
        self.request = scheduled.new.request
        self.token_ids = list(scheduled.new.token_ids)
        self.num_prompt_tokens = scheduled.new.num_prompt_tokens
        self.num_computed_tokens = scheduled.num_computed_tokens or 0
        self.block_ids: list[int] = []
