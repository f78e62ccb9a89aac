"""Runs many requests with a bounded number of them in the engine, and gives each result as it comes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

from halimede.engine.in_process import InProcessEngine
from halimede.engine.input_processor import ProcessedRequest, Prompt
from halimede.engine.interrupt import defer_interrupts
from halimede.engine.outputs import CompletionOutput, RequestOutput
from halimede.errors import RequestError
from halimede.scheduler.sampling_params import RequestOutputKind, SamplingParams

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class GenerateRequest(Generic[Key]):
    """One prompt for LLM.as_completed.

    prompt: as for LLM.generate; or the RequestError that came of making it, which then is the result.
    key: comes back with the result. sampling_params: None takes the model's recommended defaults.
    add_special_tokens: False for a prompt from LLM.render_chat, which spells them out.
    """

    prompt: Prompt | RequestError
    sampling_params: SamplingParams | None = None
    key: Key = None  # type: ignore[assignment]
    priority: int = 0
    add_special_tokens: bool = True


class RequestWindow(Generic[Key]):
    """Feeds requests to an engine, at most `max_pending` at once (None: all), in the order they come.

    Iterating gives (key, result) pairs as the requests finish; a request that was refused or has failed comes
    as a result with `error` set. The source is read only when there is room. Leaving the `with` block aborts
    what still runs.
    """

    def __init__(
        self,
        engine: InProcessEngine,
        requests: Iterable[GenerateRequest[Key]],
        defaults: SamplingParams,
        max_pending: int | None = None,
    ) -> None:
        self._engine = engine
        self._source = enumerate(requests)
        self._defaults = defaults
        self._max_pending = max_pending
        self._pending: dict[str, tuple[Key, ProcessedRequest]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.abandon([processed for _, processed in self._pending.values()])

    def __iter__(self) -> Iterator[tuple[Key, RequestOutput]]:
        while True:
            yield from self.fill()
            if not self._pending:
                return
            for output in self._engine.step_for(self._pending):
                if output.finished:
                    key, _ = self._pending.pop(output.request_id)
                    yield key, output

    def fill(self) -> Iterator[tuple[Key, RequestOutput]]:
        """Take requests while there is room, without running any; gives those that were refused."""
        while self._max_pending is None or len(self._pending) < self._max_pending:
            numbered = next(self._source, None)
            if numbered is None:
                return
            index, request = numbered
            if not isinstance(request, GenerateRequest):
                raise RequestError(f"request {index} is {request!r}; it must be a GenerateRequest")
            try:
                self._submit(request)
            except RequestError as error:
                yield request.key, _refused(f"invalid-{index}", request.prompt, error)

    def _submit(self, request: GenerateRequest[Key]) -> None:
        if isinstance(request.prompt, RequestError):
            raise request.prompt
        params = self._defaults if request.sampling_params is None else request.sampling_params
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params is {params!r}; it must be SamplingParams or None")
        with defer_interrupts():
            processed = self._engine.submit(
                request.prompt,
                params.replace(output_kind=RequestOutputKind.FINAL_ONLY),
                priority=request.priority,
                add_special_tokens=request.add_special_tokens,
            )
            self._pending[processed.request_id] = (request.key, processed)


def _refused(request_id: str, prompt: Prompt | RequestError, error: RequestError) -> RequestOutput:
    return RequestOutput(
        request_id=request_id,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=None,
        outputs=[CompletionOutput(index=0, text="", token_ids=[], finish_reason="error")],
        finished=True,
        error=error,
    )
