"""Runs a batch: lines to requests, requests through the engine, results to lines."""

import hashlib
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from halimede.engine.batch.lines import BatchInput, BatchLine, custom_id_of, open_input, parse_line
from halimede.engine.batch.progress import BatchProgress
from halimede.engine.batch.results import DUPLICATE, ResultsFile
from halimede.engine.input_processor import Prompt
from halimede.engine.interrupt import defer_interrupts
from halimede.engine.openai.errors import ApiError, as_api_error, error_body
from halimede.engine.openai.logprobs import Decode
from halimede.engine.openai.requests import ChatRequest, CompletionRequest, endpoint_of, parse_request
from halimede.engine.openai.responses import response_body
from halimede.engine.outputs import RequestOutput
from halimede.engine.request_window import GenerateRequest
from halimede.errors import BatchError, RequestError
from halimede.scheduler.sampling_params import SamplingParams

if TYPE_CHECKING:
    from halimede.engine.llm import LLM

_LINE_FIELDS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """How far a batch is. num_done and num_failed count earlier runs too; the tokens are of this run.

    num_resumed: lines that earlier runs had finished.
    """

    num_lines: int
    num_done: int
    num_failed: int
    num_resumed: int
    prompt_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class _Work:
    """A line under way. outputs: what has come, by number of the prompt."""

    number: int
    custom_id: str | None = None
    request: ChatRequest | CompletionRequest | None = None
    outputs: dict[int, RequestOutput] = field(default_factory=dict)
    num_prompts: int = 1


class Batch:
    """The two files of a batch, checked against each other and ready to run. Needs no model yet.

    summary: of what is in the results file, now or, once run() has ended in whatever way, then.
    Raises BatchError if a file cannot be used, or if the results are of other requests.
    """

    def __init__(
        self, input: str | PathLike[str], output: str | PathLike[str], *, overwrite: bool = False
    ) -> None:
        source, target = fspath(input), fspath(output)
        if (
            target != "-"
            and Path(target).exists()
            and Path(source).exists()
            and Path(target).samefile(source)
        ):
            raise BatchError(f"{target} is the input as well; name another file for the results")
        with ExitStack() as stack:
            file = stack.enter_context(open_input(source))
            self._results = stack.enter_context(ResultsFile(target, overwrite=overwrite))
            finished = self._results.read()
            self._input = BatchInput(file, finished)
            lines, done = self._input.num_lines, self._input.num_finished
            self.summary = BatchSummary(lines, done, finished.num_failed, done)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(
        self, llm: "LLM", *, served_model_names: Sequence[str] = (), show_progress: bool = True
    ) -> BatchSummary:
        """Run the lines that have no result yet, and append each result as it comes.

        served_model_names: what a body's `model` may be besides the name the LLM was made with.
        """
        parser = _Parser(llm, served_model_names)
        before = self.summary
        self._results.start()
        progress = BatchProgress(before.num_lines, before.num_done, before.num_failed, show=show_progress)
        try:
            with progress:
                for (work, index), output in llm.as_completed(parser.requests(self._input)):
                    work.outputs[index] = output
                    if len(work.outputs) == work.num_prompts:
                        self._finish(work, parser.decode, progress)
        finally:
            self.summary = BatchSummary(
                before.num_lines,
                progress.num_done,
                progress.num_failed,
                before.num_resumed,
                progress.prompt_tokens,
                progress.output_tokens,
                progress.seconds,
            )
        return self.summary

    def _finish(self, work: "_Work", decode: Decode, progress: BatchProgress) -> None:
        record = _record(work, decode)
        outputs = work.outputs.values()
        with defer_interrupts():  # a whole line, and counted
            self._results.append(record)
            progress.add(
                failed=record["error"] is not None,
                prompt_tokens=sum(len(o.prompt_token_ids or ()) for o in outputs),
                output_tokens=sum(len(c.token_ids) for o in outputs for c in o.outputs),
            )


def run_batch(
    llm: "LLM",
    input: str | PathLike[str],
    output: str | PathLike[str],
    *,
    overwrite: bool = False,
    served_model_names: Sequence[str] = (),
    show_progress: bool = True,
) -> BatchSummary:
    """Run a file of requests in OpenAI's batch format and write a file of results.

    Lines that have a result in `output` already are left alone, so that the same call goes on where an
    earlier one stopped; overwrite=True starts anew. A line that is not valid gives a result with `error` set.
    Raises BatchError if a file cannot be used.
    """
    with Batch(input, output, overwrite=overwrite) as batch:
        return batch.run(llm, served_model_names=served_model_names, show_progress=show_progress)


class _Parser:
    """Lines into requests for one LLM."""

    def __init__(self, llm: "LLM", served_model_names: Sequence[str]) -> None:
        self._llm = llm
        self._models = (*served_model_names, llm.config.model)
        self._defaults = llm.get_default_sampling_params()

    def requests(self, lines: Iterable[BatchLine]) -> Iterator[GenerateRequest[tuple[_Work, int]]]:
        """One request per prompt; a line that is not valid is one with its error."""
        for line in lines:
            work = _Work(line.number)
            try:
                prompts = self._parse(line, work)
            except RequestError as error:
                yield GenerateRequest(error, key=(work, 0))
                continue
            assert work.request is not None, "parsed"
            work.num_prompts = len(prompts)
            for index, prompt in enumerate(prompts):
                yield GenerateRequest(
                    prompt,
                    self._seeded(work.request.sampling_params, f"{work.custom_id}\n{index}"),
                    key=(work, index),
                    priority=work.request.priority,
                    add_special_tokens=work.request.add_special_tokens,
                )

    def decode(self, token_ids: list[int]) -> str:
        """Token ids to text."""
        return str(self._llm.get_tokenizer().decode(token_ids))

    def _parse(self, line: BatchLine, work: _Work) -> list[Prompt]:
        record = parse_line(line.data)
        work.custom_id = custom_id_of(record)
        if line.is_duplicate:
            raise ApiError(
                f"an earlier line has the custom_id {work.custom_id!r}; give each line one of its own",
                param="custom_id",
                code=DUPLICATE,
            )
        for name in record:
            if name not in _LINE_FIELDS:
                raise ApiError(
                    f"a line has no field {name!r}; known: {', '.join(_LINE_FIELDS)}",
                    param=name,
                    code="unknown_parameter",
                )
        if record.get("method", "POST") != "POST":
            raise ApiError(
                f"method is {record['method']!r}; it must be 'POST'", param="method", code="invalid_method"
            )
        endpoint = endpoint_of(record.get("url"))
        request = parse_request(endpoint, record.get("body"), self._models, self._defaults)
        if request.stream:
            raise ApiError(
                "stream=true is not possible in a batch; leave it out", param="stream", code="invalid_value"
            )
        work.request = request
        return request.prompts(self._llm.render_chat)

    def _seeded(self, params: SamplingParams, name: str) -> SamplingParams:
        """With a seed that depends on the engine's and the line only, so that resuming changes no result."""
        if params.seed is not None or params.greedy:
            return params
        digest = hashlib.blake2b(f"{self._llm.config.seed}\n{name}".encode("utf-8", "replace"), digest_size=8)
        return params.replace(seed=int.from_bytes(digest.digest()) >> 2)


def _record(work: _Work, decode: Decode) -> dict[str, Any]:
    """The line of the results file.

    A failed one has both the response with the status and the error object that a server would have given,
    and `error`, so that whichever of them a reader looks at tells. error.line is the number in the input.
    """
    outputs = [output for _, output in sorted(work.outputs.items())]
    error = next((_api_error(output) for output in outputs if output.error is not None), None)
    status, body = 200, None
    if error is None:
        assert work.request is not None, "only a parsed line has results"
        body = response_body(work.request, outputs, decode)
    else:
        status, body = error.status, error_body(error)
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": work.custom_id,
        "response": {"status_code": status, "request_id": f"req_{uuid.uuid4().hex}", "body": body},
        "error": None
        if error is None
        else {"code": error.code, "message": str(error), "param": error.param, "line": work.number},
    }


def _api_error(output: RequestOutput) -> ApiError:
    assert output.error is not None, "asked for the error of a result without any"
    if output.prompt_token_ids is None:  # it was refused, and never ran
        return as_api_error(output.error)
    return ApiError(str(output.error), status=500, code="engine_error")
