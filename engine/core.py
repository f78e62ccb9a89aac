"""The loop of every front end: schedule, launch, collect, update. Knows token ids only, never text.

Imports nothing but the scheduler and the executor's interface, so it runs in any process.
"""

import logging
from collections import deque
from collections.abc import Iterable

from halimede.engine.executor.base import Executor
from halimede.engine.interrupt import allow_interrupts, defer_interrupts
from halimede.scheduler.output import SchedulerOutput, SequenceUpdate
from halimede.scheduler.request import Request
from halimede.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)


class EngineCore:
    """Requests in, updates out, one step at a time.

    With an executor that takes more than one step, the next step is scheduled and launched before the result
    of the one before it is there, so that the device never waits for the host. A sequence that a token or an
    abort ends has then already run once more: what that gives is dropped, and nobody sees it.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._in_flight: deque[SchedulerOutput] = deque()
        # Of steps that Ctrl-C ended or that could not be launched.
        self._unreported: list[SequenceUpdate] = []

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
        """Launch what may be launched, wait for the oldest step and say what it changed; perhaps nothing.

        A step that fails ends the sequences that it and the steps behind it ran, with finish_reason "error",
        and no others. So does one that Ctrl-C ends: it raises KeyboardInterrupt, and the next step reports
        the sequences.
        """
        with defer_interrupts():
            if self._unreported:
                updates, self._unreported = self._unreported, []
                return updates
            failed = self._launch_ahead()
            updates = self._collect() if self._in_flight else []
            return updates if failed is None else self._join(updates, failed)

    def _launch_ahead(self) -> tuple[SchedulerOutput, str] | None:
        """Fill the executor. A step that could not be launched, with the reason."""
        in_flight = self._in_flight
        while self._scheduler.has_unfinished and len(in_flight) < self._executor.max_steps_in_flight:
            output = self._scheduler.schedule()
            if not output.scheduled and in_flight:
                break
            try:
                with allow_interrupts():
                    self._executor.launch(output)
            except Exception as error:
                return output, _log_failure(output, error)
            except BaseException:  # what the step was writing is not to be trusted
                self._unreported = self._fail((*in_flight, output), "interrupted")
                raise
            in_flight.append(output)
        return None

    def _collect(self) -> list[SequenceUpdate]:
        """The updates of the oldest step in flight."""
        output = self._in_flight[0]
        try:
            with allow_interrupts():
                result = self._executor.collect()
        except Exception as error:
            return self._fail(self._in_flight, _log_failure(output, error))
        except BaseException:
            self._unreported = self._fail(self._in_flight, "interrupted")
            raise
        self._in_flight.popleft()
        return self._scheduler.update(output, result)

    def _join(
        self, updates: list[SequenceUpdate], failed: tuple[SchedulerOutput, str]
    ) -> list[SequenceUpdate]:
        """The updates of a step and of the one behind it, which could not be launched."""
        ended = self._scheduler.fail_step(*failed)
        if updates:  # one update of a request at a time
            self._unreported = ended
            return updates
        return ended

    def _fail(self, outputs: Iterable[SchedulerOutput], reason: str) -> list[SequenceUpdate]:
        """End the sequences of steps: what was computed after one that failed was computed from nothing."""
        self._executor.abandon()
        updates = [update for output in outputs for update in self._scheduler.fail_step(output, reason)]
        self._in_flight.clear()
        return updates

    def reset_prefix_cache(self) -> bool:
        """Forget every cached block; False while sequences are running."""
        return self._scheduler.reset_prefix_cache()

    def start_profile(self, folder: str) -> None:
        """See Executor.start_profile."""
        self._executor.start_profile(folder)

    def stop_profile(self) -> str:
        """See Executor.stop_profile."""
        return self._executor.stop_profile()

    def shutdown(self) -> None:
        """Free the model and the KV cache; the engine cannot be used again."""
        self._in_flight.clear()
        self._executor.shutdown()


def _log_failure(output: SchedulerOutput, error: Exception) -> str:
    """Of the step, inside of the error's handler; the reason that its requests are given."""
    logger.exception("step %d failed with %d tokens", output.step, output.num_tokens)
    return f"{type(error).__name__}: {error}"
