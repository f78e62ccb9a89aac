"""The loop of every front end: schedule, execute, update. Knows token ids only, never text.

Imports nothing but the scheduler and the executor's interface, so it runs in any process.
"""

import logging

from halimede.engine.executor.base import Executor
from halimede.engine.interrupt import allow_interrupts, defer_interrupts
from halimede.scheduler.output import SequenceUpdate
from halimede.scheduler.request import Request
from halimede.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)


class EngineCore:
    """Requests in, updates out, one step at a time."""

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._unreported: list[SequenceUpdate] = []  # of a step that Ctrl-C ended

    def add(self, request: Request) -> None:
        """Queue a request. RequestError if it can never run; the others are not touched."""
        self._scheduler.add(request)

    def abort(self, request_id: str) -> SequenceUpdate | None:
        """Stop a request wherever it is; None if it is unknown or has ended."""
        self._unreported = [u for u in self._unreported if u.request_id != request_id]
        return self._scheduler.abort(request_id)

    @property
    def has_unfinished(self) -> bool:
        """Whether a step has anything to do."""
        return self._scheduler.has_unfinished or bool(self._unreported)

    def step(self) -> list[SequenceUpdate]:
        """Run one step and say what it changed.

        A step that fails ends the sequences it ran, with finish_reason "error", and no others. So does one
        that Ctrl-C ends: it raises KeyboardInterrupt, and the next step reports the sequences.
        """
        with defer_interrupts():
            if self._unreported:
                updates, self._unreported = self._unreported, []
                return updates
            output = self._scheduler.schedule()
            try:
                with allow_interrupts():
                    result = self._executor.execute(output)
            except Exception as error:
                logger.exception("step %d failed with %d tokens", output.step, output.num_tokens)
                return self._scheduler.fail_step(output, f"{type(error).__name__}: {error}")
            except BaseException:  # what the step was writing is not to be trusted
                self._unreported = self._scheduler.fail_step(output, "interrupted")
                raise
            return self._scheduler.update(output, result)

    def reset_prefix_cache(self) -> bool:
        """Forget every cached block; False while sequences are running."""
        return self._scheduler.reset_prefix_cache()

    def shutdown(self) -> None:
        """Free the model and the KV cache; the engine cannot be used again."""
        self._executor.shutdown()
