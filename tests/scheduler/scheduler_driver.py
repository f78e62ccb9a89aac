"""A scheduler with a runner that samples what it is told to, for tests of single behaviours."""

from collections.abc import Sequence
from typing import Any

from halimede.scheduler.config import SchedulerConfig
from halimede.scheduler.output import ModelRunnerOutput, SchedulerOutput, SequenceUpdate
from halimede.scheduler.request import Request
from halimede.scheduler.sampling_params import SamplingParams
from halimede.scheduler.scheduler import Scheduler


def request(
    request_id: str,
    prompt: Sequence[int],
    *,
    priority: int = 0,
    arrival_time: float = 0.0,
    eos: Sequence[int] = (),
    salt: str | None = None,
    **params: Any,
) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling_params=SamplingParams(**{"max_tokens": None, **params}),
        seed=0,
        arrival_time=arrival_time,
        priority=priority,
        eos_token_ids=frozenset(eos),
        cache_salt=salt,
    )


class Driver:
    """Block size 4 and room for everything, unless told otherwise."""

    def __init__(self, **changes: Any) -> None:
        values = {"num_blocks": 101, "block_size": 4, "max_model_len": 100, "max_num_seqs": 8}
        self.scheduler = Scheduler(SchedulerConfig(**{**values, "max_num_batched_tokens": 64, **changes}))
        self.ids: dict[int, str] = {}
        self.output = SchedulerOutput(-1, ())

    def add(self, request_id: str, prompt: Sequence[int], **values: Any) -> int:
        seq_id = self.scheduler.add(request(request_id, prompt, **values))
        self.ids[seq_id] = request_id
        return seq_id

    def schedule(self) -> dict[str, int]:
        """Decide a step; the number of tokens it gives each request, in order."""
        self.output = self.scheduler.schedule()
        self.scheduler.check_integrity()
        return {self.ids[row.seq_id]: row.num_tokens for row in self.output.scheduled}

    def update(self, *tokens: int, **results: Any) -> list[SequenceUpdate]:
        """Give each sequence that samples these tokens (7 if there are none)."""
        sampled = {row.seq_id: tokens or (7,) for row in self.output.scheduled if row.needs_sample}
        updates = self.scheduler.update(self.output, ModelRunnerOutput(sampled, **results))
        self.scheduler.check_integrity()
        return updates

    def step(self, *tokens: int) -> dict[str, int]:
        scheduled = self.schedule()
        self.update(*tokens)
        return scheduled

    def scheduler_step(self) -> None:
        """Nothing but schedule() and update(), to be measured."""
        output = self.scheduler.schedule()
        self.scheduler.update(output, ModelRunnerOutput({row.seq_id: (7,) for row in output.scheduled}))

    def step_until_preempted(self) -> dict[str, int]:
        """Steps up to and with the first that preempts."""
        for _ in range(100):
            scheduled = self.schedule()
            if self.output.preempted_seq_ids:
                return scheduled
            self.update()
        raise AssertionError("nothing was preempted in 100 steps")

    def preempted(self) -> list[str]:
        return [self.ids[seq_id] for seq_id in self.output.preempted_seq_ids]

    def finished(self) -> list[str]:
        return [self.ids[seq_id] for seq_id in self.output.finished_seq_ids]
