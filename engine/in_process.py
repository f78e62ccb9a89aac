"""The engine in the caller's own process: requests in, RequestOutputs out, a step at a time.

Several callers may take turns, such as a paused stream and a generate() beside it: each asks for what is new
of its own requests, and what a step brings for the others waits in a mailbox.
"""

import itertools
from collections.abc import Collection, Iterable

from halimede.engine.core import EngineCore
from halimede.engine.input_processor import InputProcessor, ProcessedRequest, Prompt
from halimede.engine.interrupt import defer_interrupts
from halimede.engine.output_processor import OutputProcessor
from halimede.engine.outputs import RequestOutput
from halimede.errors import EngineDeadError
from halimede.scheduler.sampling_params import SamplingParams


class InProcessEngine:
    """The core between the two processors. Not for use from several threads at once."""

    def __init__(self, core: EngineCore, inputs: InputProcessor, outputs: OutputProcessor) -> None:
        self._core = core
        self._inputs = inputs
        self._outputs = outputs
        self._request_ids = itertools.count()
        self._mailbox: dict[str, list[RequestOutput]] = {}
        self._closed = False

    def submit(
        self, prompt: Prompt, params: SamplingParams, *, priority: int = 0, add_special_tokens: bool = True
    ) -> ProcessedRequest:
        """Check a prompt and queue it; RequestError, with nothing left behind, if it is refused."""
        if self._closed:
            raise EngineDeadError("this LLM was shut down; make a new one")
        processed = self._inputs.process(
            str(next(self._request_ids)),
            prompt,
            params,
            priority=priority,
            add_special_tokens=add_special_tokens,
        )
        self._outputs.add(processed)
        try:
            for request in processed.requests:
                self._core.add(request)
        except BaseException:
            self.abandon([processed])
            raise
        return processed

    def step_for(self, request_ids: Collection[str]) -> list[RequestOutput]:
        """What is new of these requests; runs a step unless another caller's step has brought something."""
        waiting = self._take_mail(request_ids)
        if waiting:
            return waiting
        if not self._core.has_unfinished:
            raise EngineDeadError(f"requests {sorted(request_ids)} were lost; please report this as a bug")
        with defer_interrupts():  # but for the model's own work, which the core lets Ctrl-C end
            processed = self._outputs.process(self._core.step())
            for request_id in processed.to_abort:
                self._core.abort(request_id)
            for output in processed.outputs:
                self._mailbox.setdefault(output.request_id, []).append(output)
        return self._take_mail(request_ids)

    def abandon(self, requests: Iterable[ProcessedRequest]) -> None:
        """Forget requests, stopping those that still run."""
        with defer_interrupts():
            for processed in requests:
                self._mailbox.pop(processed.request_id, None)
                for request_id in self._outputs.forget(processed.request_id):
                    self._core.abort(request_id)

    def shutdown(self) -> None:
        """Free the model and the KV cache. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self._core.shutdown()

    def _take_mail(self, request_ids: Collection[str]) -> list[RequestOutput]:
        """What has come for these requests. Looks at the mail, not at the requests: those may be many."""
        mine = [request_id for request_id in self._mailbox if request_id in request_ids]
        return [output for request_id in mine for output in self._mailbox.pop(request_id)]
