"""A model of what a scheduler must do, written without looking at how it does it.

It plays the user, who adds and aborts requests at random, and the runner, whose KV cache is a list that
holds in each slot the identity of the whole prefix that was written there. Before a step's results count,
every position that a scheduled sequence reads must hold exactly that sequence's own prefix: wrong sharing,
sharing before the content is there, and stale blocks all show up as a difference.
"""

import random
from dataclasses import dataclass, field

from halimede.scheduler.config import SchedulerConfig
from halimede.scheduler.output import ModelRunnerOutput, ScheduledSequence, SchedulerOutput, SequenceUpdate
from halimede.scheduler.request import Request
from halimede.scheduler.sampling_params import SamplingParams
from halimede.scheduler.scheduler import Scheduler

VOCAB = 5
EOS = 0
STOP = 1
SALTS = (None, None, None, "salt")


@dataclass
class Expected:
    """One request: its tokens so far, the identity of the prefix at each of them, and its place in line."""

    request: Request
    key: tuple[int, float, int]
    tokens: list[int] = field(default_factory=list)
    prefixes: list[int] = field(default_factory=list)
    finished: str | None = None

    def append(self, token: int) -> None:
        parent = self.prefixes[-1] if self.prefixes else hash((self.request.cache_salt == "salt", 12345))
        self.tokens.append(token)
        self.prefixes.append(hash((parent, token)))

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt_token_ids)

    def sample(self) -> int:
        """The next token: of these tokens only, so that equal prefixes go on alike."""
        return (self.prefixes[-1] >> 11) % VOCAB

    def finish_reason(self, max_model_len: int) -> tuple[str | None, int | None]:
        """finish_reason and stop_reason of a request that has just got its last token."""
        params = self.request.sampling_params
        if self.num_output >= params.min_tokens:
            if self.tokens[-1] in self.request.eos_token_ids:
                return "stop", None
            if self.tokens[-1] in (params.stop_token_ids or ()):
                return "stop", self.tokens[-1]
        at_end = self.num_output == params.max_tokens or len(self.tokens) == max_model_len
        return ("length" if at_end else None), None


@dataclass
class Row:
    """What the runner knows of a sequence: the slots of its blocks in order, and how much is computed."""

    slots: list[int] = field(default_factory=list)
    num_computed: int = 0


class Simulation:
    """A scheduler under test, a user, a runner and the model of what must come out."""

    def __init__(self, config: SchedulerConfig, seed: int, *, max_sampled: int = 1, trouble: float = 0.002):
        self.config = config
        self.scheduler = Scheduler(config)
        self.random = random.Random(seed)
        self.max_sampled = max_sampled
        self.trouble = trouble
        self.kv = [0] * (config.num_blocks * config.block_size)
        self.expected: dict[int, Expected] = {}
        self.aborted: dict[int, Expected] = {}
        self.rows: dict[int, Row] = {}
        self.forgotten_twice: set[int] = set()
        self.num_added = 0
        self.finished: dict[str, int] = {}
        self.prompts = [self._tokens(config.max_model_len - 1) for _ in range(4)]

    def run(self, num_steps: int) -> None:
        """Random life, with a pause now and then in which everything must finish."""
        for step in range(num_steps):
            self._live(adding=step % 3000 < 2900)
            if step % 3000 == 2999:
                self.drain()
        self.drain()

    def drain(self) -> None:
        """Add nothing more: every request must finish, and nothing may stay behind."""
        for _ in range(60 * (len(self.expected) + 1)):
            if not self.scheduler.has_unfinished:
                break
            self.step()
        assert not self.expected, f"requests that never finish: {list(self.expected)}"
        assert not self.scheduler.has_unfinished
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0)
        assert self.scheduler.kv_cache_usage == 0
        self.step()  # nothing to run, but the runner hears of the last ones
        assert not self.rows, f"sequences that the runner still knows: {list(self.rows)}"
        if self.random.random() < 0.5:
            assert self.scheduler.reset_prefix_cache()

    def _live(self, adding: bool) -> None:
        if adding and len(self.expected) < 14 and self.random.random() < 0.5:
            self.add()
        if self.random.random() < 0.02:
            self.abort()
        self.step()

    def _tokens(self, count: int) -> list[int]:
        return [self.random.randrange(VOCAB) for _ in range(count)]

    def add(self) -> None:
        """One request; its prompt starts like others do."""
        rng, config = self.random, self.config
        longest = config.max_model_len - 1
        if not config.enable_chunked_prefill:
            longest = min(longest, config.max_num_batched_tokens)
        prompt = rng.choice(self.prompts)[: rng.randrange(longest + 1)] + self._tokens(rng.randrange(4))
        prompt = prompt[:longest] or [2]
        max_tokens = rng.choice((1, 4, 12, 24, 24, None))
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=rng.choice((0, 0, min(max_tokens or 9, 9))),
            stop_token_ids=rng.choice((None, [STOP], [STOP, EOS])),
            skip_reading_prefix_cache=True if rng.random() < 0.05 else None,
        )
        request = Request(
            request_id=f"r{self.num_added}",
            prompt_token_ids=tuple(prompt),
            sampling_params=params,
            seed=0,
            arrival_time=float(self.num_added - rng.randrange(5)),
            priority=rng.choice((0, 0, 1, 2)),
            cache_salt=rng.choice(SALTS),
            eos_token_ids=frozenset((EOS,)) if rng.random() < 0.3 else frozenset(),
        )
        self.num_added += 1
        seq_id = self.scheduler.add(request)
        key = (request.priority, request.arrival_time, seq_id)
        self.expected[seq_id] = Expected(request, key if config.policy == "priority" else (0, 0.0, seq_id))
        for token in prompt:
            self.expected[seq_id].append(token)

    def abort(self) -> None:
        """End a random request, or one that is not there."""
        if not self.expected:
            assert self.scheduler.abort("nobody") is None
            return
        seq_id = self.random.choice(list(self.expected))
        expected = self.aborted[seq_id] = self.expected.pop(seq_id)
        update = self.scheduler.abort(expected.request.request_id)
        assert update is not None
        assert (update.request_id, update.finish_reason) == (expected.request.request_id, "abort")
        assert self.scheduler.abort(expected.request.request_id) is None

    def step(self) -> None:
        """schedule, run or fail, update; integrity is checked after each."""
        scheduler = self.scheduler
        self.aborted.clear()
        if self.random.random() < 0.01:
            assert scheduler.reset_prefix_cache() == (scheduler.num_running == 0)
        output = scheduler.schedule()
        scheduler.check_integrity()
        self._forget(output)
        self._check_choice(output)
        for row in output.scheduled:
            self._take_in(row)
        if self.random.random() < 0.02:
            self.abort()
        if output.scheduled and self.random.random() < self.trouble:
            self._fail(output)
        else:
            self._write_and_read(output)
            self._update(output)
        scheduler.check_integrity()

    def _forget(self, output: SchedulerOutput) -> None:
        for seq_id in output.finished_seq_ids:
            assert seq_id not in self.expected, f"sequence {seq_id} is not finished"
            assert seq_id in self.rows or seq_id in self.forgotten_twice, (
                f"unknown sequence {seq_id} finished"
            )
            self.rows.pop(seq_id, None)
        for seq_id in output.preempted_seq_ids:
            assert seq_id in self.rows or seq_id in self.forgotten_twice, (
                f"unknown sequence {seq_id} preempted"
            )
            self.rows.pop(seq_id, None)

    def _check_choice(self, output: SchedulerOutput) -> None:
        """Who was chosen: within the limits, in the order of the policy, and never nobody."""
        config, scheduled = self.config, [row.seq_id for row in output.scheduled]
        assert output.num_tokens <= config.max_num_batched_tokens
        assert len(set(scheduled)) == len(scheduled) <= config.max_num_seqs
        assert bool(scheduled) == bool(self.expected)
        running = {i for i in scheduled if i in self.expected} | {i for i in self.rows if i in self.expected}
        waiting = self.expected.keys() - running
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (len(running), len(waiting))
        if config.policy == "fcfs" and running and waiting:
            assert max(running) < min(waiting), "first come, first served"
        worst = max((self.expected[i].key for i in running), default=None)
        for seq_id in output.preempted_seq_ids:
            if seq_id in self.expected and worst is not None and seq_id not in self.forgotten_twice:
                assert self.expected[seq_id].key > worst, f"sequence {seq_id} was not the victim"
        self.forgotten_twice.clear()

    def _start(self, scheduled: ScheduledSequence) -> int:
        """Where a row begins; one that does not say goes on where it was."""
        if scheduled.num_computed_tokens is not None:
            return scheduled.num_computed_tokens
        assert (scheduled.num_tokens, scheduled.new_block_ids, scheduled.new) == (1, (), None)
        assert scheduled.needs_sample
        return self.rows[scheduled.seq_id].num_computed

    def _take_in(self, scheduled: ScheduledSequence) -> None:
        """The runner's side: rows start with `new` and go on where they were."""
        expected, size = self.expected[scheduled.seq_id], self.config.block_size
        start = self._start(scheduled)
        end = start + scheduled.num_tokens
        if scheduled.new is not None:
            assert scheduled.seq_id not in self.rows
            assert list(scheduled.new.token_ids) == expected.tokens
            assert scheduled.new.request is expected.request
            assert scheduled.new.num_prompt_tokens == len(expected.request.prompt_token_ids)
            cached = self.config.enable_prefix_caching and expected.request.sampling_params.reads_prefix_cache
            assert start % size == 0
            assert cached or start == 0
            self.rows[scheduled.seq_id] = Row(num_computed=start)
            if not self.config.enable_chunked_prefill:
                whole = len(expected.tokens) <= self.config.max_num_batched_tokens
                assert scheduled.needs_sample or not whole
        row = self.rows[scheduled.seq_id]
        for block_id in scheduled.new_block_ids:
            assert 0 < block_id < self.config.num_blocks
            row.slots.extend(range(block_id * size, (block_id + 1) * size))
        assert row.num_computed == start < end <= len(row.slots)
        assert scheduled.needs_sample == (end == len(expected.tokens))
        row.num_computed = end

    def _write_and_read(self, output: SchedulerOutput) -> None:
        """Write all of the step, then read: the order inside each layer."""
        kv = self.kv
        reads = []
        for scheduled in output.scheduled:
            expected = self.expected.get(scheduled.seq_id)
            row = self.rows[scheduled.seq_id]
            if expected is None:  # aborted since; others may share what it writes all the same
                expected = self.aborted[scheduled.seq_id]
            end = row.num_computed
            start = end - scheduled.num_tokens
            for slot, prefix in zip(row.slots[start:end], expected.prefixes[start:end], strict=True):
                kv[slot] = prefix
            reads.append((scheduled.seq_id, row.slots[:end], expected.prefixes[:end]))
        for seq_id, slots, prefixes in reads:
            if list(map(kv.__getitem__, slots)) != prefixes:
                found = list(map(kv.__getitem__, slots))
                position = next(p for p, prefix in enumerate(prefixes) if found[p] != prefix)
                raise AssertionError(
                    f"sequence {seq_id} reads somebody else's content at position {position}"
                )

    def _update(self, output: SchedulerOutput) -> None:
        sampled: dict[int, tuple[int, ...]] = {}
        errors: dict[int, str] = {}
        wanted: list[SequenceUpdate] = []
        for row in output.scheduled:
            expected = self.expected.get(row.seq_id)
            if expected is None:
                sampled[row.seq_id] = (3,)
            elif self.random.random() < self.trouble / 4:
                errors[row.seq_id] = "not finite"
                wanted.append(self._end(row.seq_id, "error", error="not finite"))
            elif row.needs_sample:
                sampled[row.seq_id], update = self._sample(row.seq_id, expected)
                wanted.append(update)
        updates = self.scheduler.update(output, ModelRunnerOutput(sampled, errors=errors))
        assert [u._replace(num_cached_tokens=0) for u in updates] == wanted

    def _sample(self, seq_id: int, expected: Expected) -> tuple[tuple[int, ...], SequenceUpdate]:
        """Some tokens, of which those after a stop must be dropped, and the update they must give."""
        sampled: list[int] = []
        count = self.random.randint(1, self.max_sampled)
        reason, stop_reason = None, None
        while len(sampled) < count and reason is None:
            sampled.append(expected.sample())
            expected.append(sampled[-1])
            reason, stop_reason = expected.finish_reason(self.config.max_model_len)
        surplus = tuple(self._tokens(count - len(sampled)))
        update = SequenceUpdate(expected.request.request_id, tuple(sampled))
        if reason is not None:
            ended = self._end(seq_id, reason)
            update = ended._replace(new_token_ids=tuple(sampled), stop_reason=stop_reason)
        return tuple(sampled) + surplus, update

    def _end(self, seq_id: int, reason: str, error: str | None = None) -> SequenceUpdate:
        expected = self.expected.pop(seq_id)
        self.finished[reason] = self.finished.get(reason, 0) + 1
        return SequenceUpdate(expected.request.request_id, finish_reason=reason, error=error)

    def _fail(self, output: SchedulerOutput) -> None:
        """The step breaks half-way: what it was to write is garbage."""
        for scheduled in output.scheduled:
            row = self.rows[scheduled.seq_id]
            for slot in row.slots[row.num_computed - scheduled.num_tokens : row.num_computed]:
                self.kv[slot] = -1
        alive = [row.seq_id for row in output.scheduled if row.seq_id in self.expected]
        wanted = [self._end(seq_id, "error", error="broken") for seq_id in alive]
        updates = self.scheduler.fail_step(output, "broken")
        assert [u._replace(num_cached_tokens=0) for u in updates] == wanted
        self.forgotten_twice = {*output.finished_seq_ids, *output.preempted_seq_ids}
