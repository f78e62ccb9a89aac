"""What runs next: continuous batching by a token budget, without phases.

Every step hands out max_num_batched_tokens so that each sequence's computed tokens catch up with its known
ones. That one rule is prefill, chunked prefill, decode, prefix-cache hits and resuming after a preemption.
"""

from bisect import bisect_left, bisect_right, insort
from itertools import islice, pairwise
from math import inf
from operator import attrgetter

from halimede.errors import RequestError
from halimede.scheduler.block_manager import BlockManager, Hit
from halimede.scheduler.config import SchedulerConfig
from halimede.scheduler.intake import check_request, take_in
from halimede.scheduler.output import (
    FinishReason,
    ModelRunnerOutput,
    NewSequence,
    ScheduledSequence,
    SchedulerOutput,
    SequenceUpdate,
)
from halimede.scheduler.policy import WaitingQueue, scheduling_key
from halimede.scheduler.request import Request
from halimede.scheduler.sequence import Sequence

_by_key = attrgetter("key")
_by_rank = attrgetter("rank")
# Makes a named tuple from all its fields at C speed: the classes' own constructors are Python functions, and
# would take a third of the time of the two loops that run once per sequence and step.
_make = tuple.__new__
# Cached blocks per step that looking up the prefix of a sequence that finds no room may cost on average.
_HITS_PER_STEP = 32


class _Plan:
    """What schedule() has decided so far."""

    __slots__ = ("budget", "preempted", "scheduled")

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.scheduled: list[ScheduledSequence] = []
        self.preempted: list[int] = []


class Scheduler:
    """Decides what each step runs, and which requests its results finish.

    The cycle is `output = schedule()`, run it, then `update(output, result)` or, when it could not be run,
    `fail_step(output, reason)`; `add` and `abort` may come at any time in between. Further steps may be
    scheduled before that: they run the tokens that those in flight sample, unseen. Then update and fail_step
    must come in the order of the steps, and the steps must be run in that order, one after the other.

    The rule that keeps blocks from being freed twice, and from being read half-written: a sequence gives its
    blocks back in the moment it leaves the running ones (ended, aborted or preempted), whatever is in flight,
    and never again; results for a sequence that has left are dropped, but for the tokens of a preempted one.
    A step in flight may then still write to the blocks. Nobody sees that: only steps scheduled later, and so
    run later, get those blocks and read no place that they or a prefix before them have not written; and the
    place of a token that is still unknown is in no block that the prefix cache hands out.

    num_preemptions: preemptions so far. prefix_cache_queries, prefix_cache_hits: prompt tokens looked up in
    the prefix cache, and found there, when requests were first scheduled.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._blocks = BlockManager(
            config.num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
        )
        self._sequences: dict[int, Sequence] = {}
        self._requests: dict[str, Sequence] = {}
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []  # ordered by key, so that the last one is the victim
        self._in_flight: dict[int, list[Hit]] = {}  # by step: what it fills of the prefix cache
        self._finished: list[int] = []  # what the runner has not been told to forget yet
        self._preempted: list[int] = []  # the same, left over from a failed step
        self._next_seq_id = 0
        self._next_step = 0
        self.num_preemptions = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._sequences)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for room, preempted ones included."""
        return len(self._waiting)

    @property
    def kv_cache_usage(self) -> float:
        """Share of the KV cache that running sequences hold, in [0, 1]."""
        return self._blocks.usage

    def add(self, request: Request) -> int:
        """Take a request and return its seq_id. Raises RequestError when it can never be served."""
        check_request(request, self._config)
        if request.request_id in self._requests:
            raise RequestError(
                f"request {request.request_id!r} is already being served; give each request an id of its own"
            )
        seq_id = self._next_seq_id
        self._next_seq_id += 1
        key = scheduling_key(self._config.policy, request, seq_id)
        sequence = Sequence(seq_id, request, key, self._config.max_model_len)
        self._sequences[seq_id] = self._requests[request.request_id] = sequence
        self._waiting.push(sequence)
        return seq_id

    def abort(self, request_id: str) -> SequenceUpdate | None:
        """End a request now; None when there is no such request (any more).

        A step that is running with it may still be updated: its result for this request is ignored.
        """
        sequence = self._requests.get(request_id)
        return None if sequence is None else self._cut_short(sequence, "abort")

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks; False, and nothing forgotten, while a sequence runs."""
        if self._running:
            return False
        self._blocks.reset_prefix_cache()
        return True

    def schedule(self) -> SchedulerOutput:
        """Decide the next step. It is never empty while a request is unfinished and no step is in flight.

        One that is empty while others are in flight is no step: it names nobody, and is neither to be run
        nor to be given to update.

        Sequences take turns by key, running ones first; but a waiting one whose rank is smaller than that
        of the next running one comes before it, and may preempt from the other end of the order. So a
        sequence that this step runs is never preempted in this step.
        """
        plan = _Plan(self._config.max_num_batched_tokens)
        index = 0
        overtaking = True
        while True:
            head = self._waiting.peek()
            index = self._schedule_running(plan, index, head.rank if head and overtaking else inf)
            at_end = index == len(self._running)
            if not plan.budget or head is None or (at_end and plan.preempted):
                break
            if self._admit(plan, index):
                index += 1
            elif at_end:
                break
            else:
                overtaking = False
        return self._make_output(plan)

    def _make_output(self, plan: _Plan) -> SchedulerOutput:
        if not plan.scheduled and self._in_flight:
            self._preempted += plan.preempted
            return SchedulerOutput(self._next_step, ())
        assert plan.scheduled or not self._sequences, "a step with nothing to run while requests wait"
        output = SchedulerOutput(
            step=self._next_step,
            scheduled=tuple(plan.scheduled),
            finished_seq_ids=tuple(self._finished),
            preempted_seq_ids=(*self._preempted, *plan.preempted),
        )
        self._in_flight[self._next_step] = self._blocks.take_registrations()
        self._next_step += 1
        self._finished, self._preempted = [], []
        return output

    def update(self, output: SchedulerOutput, result: ModelRunnerOutput) -> list[SequenceUpdate]:
        """Take in what a step produced; one update for each request that it changed."""
        self._in_flight.pop(output.step, None)
        updates: list[SequenceUpdate] = []
        sampled, sequences = result.sampled_token_ids, self._sequences
        plain = not (result.errors or result.logprobs or result.prompt_logprobs)
        for row in output.scheduled:
            seq_id = row[0]
            sequence = sequences.get(seq_id)
            if sequence is None:
                continue  # ended while the step ran
            new = sampled.get(seq_id)
            # The usual row, one token that ends nothing, pays for nothing else: this loop is the host's time.
            if plain and new is not None and len(new) == 1:
                token, known = new[0], sequence.token_ids
                if token not in sequence.stop_token_ids and len(known) < sequence.last_length:
                    known.append(token)
                    sequence.num_pending_tokens -= 1
                    if sequence.num_computed_tokens >= sequence.register_at:
                        self._blocks.register_full_blocks(sequence)
                    fields = (sequence.request_id, new, (), (), sequence.num_cached_tokens, None, None, None)
                    updates.append(_make(SequenceUpdate, fields))
                    continue
            if row.needs_sample or not plain:
                self._take_in(sequence, row, result, updates)
        registrations = self._blocks.take_registrations()
        if self._in_flight:  # what has just become known was computed, if at all, by the last of them
            newest = next(reversed(self._in_flight.values()))
            newest += registrations
        return updates

    def _take_in(
        self,
        sequence: Sequence,
        row: ScheduledSequence,
        result: ModelRunnerOutput,
        updates: list[SequenceUpdate],
    ) -> None:
        """Give a sequence what its row of a step produced, and add the update, if it is one."""
        sequence.num_pending_tokens -= row.needs_sample
        update = take_in(sequence, row, result)
        if update is None:
            return
        updates.append(update)
        if update.error is None:
            self._blocks.register_full_blocks(sequence)
        sequence.settle(decoding=False)  # more than one token may have come
        if update.finish_reason is not None:
            # What a failed one computed may be as broken as its logits.
            self._remove(sequence, keep_cached=update.error is None)

    def fail_step(self, output: SchedulerOutput, reason: str) -> list[SequenceUpdate]:
        """End every request of a step that could not be run; the others go on.

        What the step was to write is taken out of the prefix cache, and what the runner was told to forget
        is told again with the next step. Of the steps that were in flight behind it none may be updated: they
        have failed too.
        """
        self._blocks.drop_registrations(self._in_flight.pop(output.step, ()))
        self._finished += output.finished_seq_ids
        self._preempted += output.preempted_seq_ids
        rows = (self._sequences.get(row.seq_id) for row in output.scheduled)
        return [self._cut_short(sequence, "error", reason) for sequence in rows if sequence is not None]

    def check_integrity(self) -> None:
        """Raise AssertionError with the equation that does not hold."""
        running, waiting = self._running, self._waiting.sequences()
        total = len(self._sequences)
        assert len(running) + len(waiting) == total == len(self._requests), (
            f"running + waiting == unfinished: {len(running)} + {len(waiting)} != {total}"
        )
        assert len(running) <= self._config.max_num_seqs, f"running <= max_num_seqs: {len(running)}"
        for first, second in pairwise(running):
            assert first.key < second.key, f"running in order: {first.key} < {second.key}"
        for sequence in running:
            assert sequence.is_running, f"running sequence {sequence.seq_id}.is_running == True"
            assert self._sequences.get(sequence.seq_id) is sequence, f"sequence {sequence.seq_id} is known"
        for sequence in waiting:
            held = len(sequence.block_table) + sequence.num_computed_tokens + sequence.is_running
            assert held == 0, f"blocks and computed tokens of waiting sequence {sequence.seq_id} == 0"
        self._blocks.check_integrity(running)

    def _schedule_running(self, plan: _Plan, index: int, limit: float) -> int:
        """Give running sequences, from `index` on, their share; return the index of the next one.

        Stops before a sequence whose rank is greater than `limit`. One whose last token a step in flight
        samples has no share.
        """
        running, scheduled = self._running, plan.scheduled
        stop = None if limit == inf else bisect_right(running, limit, index, key=_by_rank)
        while True:
            first, most = index, index + plan.budget
            for sequence in islice(running, index, most if stop is None else min(stop, most)):
                # The usual row, one token for which there is room, pays for nothing else, as in update().
                end = sequence.num_computed_tokens + 1
                if end > sequence.plain_until:
                    break
                sequence.num_computed_tokens = end
                sequence.num_pending_tokens += 1
                scheduled.append(sequence.plain_row)
                index += 1
            plan.budget -= index - first
            # A preemption may have shortened the list.
            if not plan.budget or index >= len(running) or index == stop:
                return index
            sequence = running[index]
            num_known = len(sequence.token_ids) + sequence.num_pending_tokens
            if num_known < sequence.max_num_tokens and not self._schedule_chunk(plan, sequence):
                return index
            index += 1

    def _schedule_chunk(self, plan: _Plan, sequence: Sequence) -> bool:
        """Give a running sequence its share of the step; False when it had to make way for others."""
        start = sequence.num_computed_tokens
        num_known = len(sequence.token_ids) + sequence.num_pending_tokens
        end = min(num_known, start + plan.budget)
        needs_sample = end == num_known
        new_block_ids: tuple[int, ...] | None = ()
        if end > sequence.capacity:
            new_block_ids = self._blocks.grow(sequence, end)
            while new_block_ids is None:
                if self._preempt_last(plan) is sequence:
                    return False
                new_block_ids = self._blocks.grow(sequence, end)
        sequence.num_computed_tokens = end
        sequence.num_pending_tokens += needs_sample
        self._blocks.register_full_blocks(sequence)
        sequence.settle(decoding=needs_sample)
        row = (sequence.seq_id, end - start, start, new_block_ids, needs_sample, None)
        plan.scheduled.append(_make(ScheduledSequence, row))
        plan.budget -= end - start
        return True

    def _admit(self, plan: _Plan, index: int) -> bool:
        """Start the first waiting sequence if there is room; those running from `index` on may make way."""
        sequence = self._waiting.peek()
        assert sequence is not None, "nobody to admit"
        running, blocks, config = self._running, self._blocks, self._config
        if sequence.num_pending_tokens:
            return False  # preempted: what it goes on with is still being sampled
        if index == len(running):
            if len(running) >= config.max_num_seqs:
                return False
            if sequence.blocks_wanted > blocks.num_free_blocks and self._next_step < sequence.retry_step:
                return False
        hits = blocks.match_prefix(sequence)
        num_known = len(sequence.token_ids)
        num_missing = num_known - len(hits) * config.block_size
        # Output may have made a preempted sequence too long for any one step: that one is split all the same.
        keep_whole = not config.enable_chunked_prefill and num_known <= config.max_num_batched_tokens
        if keep_whole and num_missing > plan.budget:
            return False
        most_free = blocks.num_free_blocks + sum(len(victim.block_table) for victim in running[index:])
        while True:
            sequence.blocks_wanted = blocks.num_blocks_wanted(sequence, hits)
            if len(running) < config.max_num_seqs and sequence.blocks_wanted <= blocks.num_free_blocks:
                break
            if index == len(running) or sequence.blocks_wanted > most_free:
                # Looking up costs time for each hit: the more there are, the more steps share it.
                sequence.retry_step = self._next_step + 1 + len(hits) // _HITS_PER_STEP
                return False
            self._preempt_last(plan)
        self._waiting.pop()
        sequence.is_running = True
        insort(running, sequence, key=_by_key)
        blocks.allocate(sequence, hits)
        self._start(plan, sequence)
        return True

    def _start(self, plan: _Plan, sequence: Sequence) -> None:
        """Give a sequence that was just admitted its share of the step."""
        start = sequence.num_computed_tokens
        if not sequence.was_scheduled:
            sequence.was_scheduled = True
            sequence.num_cached_tokens = start
            if self._config.enable_prefix_caching and sequence.request.sampling_params.reads_prefix_cache:
                self.prefix_cache_queries += sequence.num_prompt_tokens
                self.prefix_cache_hits += start
        known = tuple(sequence.token_ids)
        end = min(len(known), start + plan.budget)
        needs_sample = end == len(known)
        sequence.num_computed_tokens = end
        sequence.num_pending_tokens += needs_sample
        self._blocks.register_full_blocks(sequence)
        sequence.settle(decoding=needs_sample)
        blocks = tuple(sequence.block_table)
        new = NewSequence(sequence.request, known, sequence.num_prompt_tokens)
        row = ScheduledSequence(sequence.seq_id, end - start, start, blocks, needs_sample, new)
        plan.scheduled.append(row)
        plan.budget -= end - start

    def _preempt_last(self, plan: _Plan) -> Sequence:
        """Send the last running sequence back to wait. It keeps its tokens, and computes them again."""
        victim = self._running.pop()
        victim.is_running = False
        self._blocks.free(victim)
        self._waiting.push(victim)
        plan.preempted.append(victim.seq_id)
        self.num_preemptions += 1
        return victim

    def _cut_short(
        self, sequence: Sequence, reason: FinishReason, error: str | None = None
    ) -> SequenceUpdate:
        """End a sequence that no result has ended, and return its last update."""
        self._remove(sequence)
        return SequenceUpdate(
            sequence.request_id,
            num_cached_tokens=sequence.num_cached_tokens,
            finish_reason=reason,
            error=error,
        )

    def _remove(self, sequence: Sequence, *, keep_cached: bool = True) -> None:
        """Forget a sequence and free its blocks."""
        del self._sequences[sequence.seq_id]
        del self._requests[sequence.request_id]
        if sequence.is_running:
            del self._running[bisect_left(self._running, sequence.key, key=_by_key)]
            self._blocks.free(sequence, keep_cached=keep_cached)
            self._finished.append(sequence.seq_id)
        else:
            self._waiting.discard(sequence)
