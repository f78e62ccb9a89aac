"""`halimede generate MODEL PROMPT`: prompts in, answers out."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halimede.engine.cli.answer import has_chat_template, speeds_of, stream_answer
from halimede.engine.cli.options import ModelArgument
from halimede.engine.cli.terminal import complain, notice, replace_what_cannot_be_encoded, write_text
from halimede.engine.config import EngineConfig
from halimede.errors import RequestError
from halimede.scheduler.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from halimede.engine.llm import LLM
    from halimede.engine.outputs import RequestOutput

_SOME_FAILED = 3


@dataclass(frozen=True, slots=True)
class _Input:
    """One prompt. file: where it was read, None for the argument."""

    text: str
    file: Path | None = None


def generate(
    model: ModelArgument,
    prompt: Annotated[
        str | None, typer.Argument(help="What to answer; - reads it from standard input.")
    ] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option(
            "--file",
            "-f",
            exists=True,
            dir_okay=False,
            readable=True,
            help="Read a prompt from a file; may be repeated: several prompts run together.",
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is; do not apply the chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON per prompt, and nothing else.")
    ] = False,
    *,
    engine: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Answer prompts. The answer to one is written as it is generated; speeds go to standard error.

    A model with a chat template answers the prompt as a user's message; with --raw, or without a template,
    it continues the prompt's text. Of a prompt from a file or standard input one newline at the end is taken
    off. Several prompts run in one batch and their answers are written in the order of the prompts.
    """
    replace_what_cannot_be_encoded()
    inputs = list(_read_inputs(prompt, file or ()))
    if not inputs:
        raise typer.BadParameter("no prompt: give PROMPT, - for standard input, or --file PATH")
    # Bad values are told before the model is loaded.
    SamplingParams(**sampling)
    EngineConfig(model=model, **engine)

    from halimede import LLM

    with LLM(model, **engine) as llm:
        params = llm.get_default_sampling_params().replace(**{"max_tokens": None, **sampling})
        chat = not raw and has_chat_template(llm)
        if len(inputs) == 1 and not as_json:
            _stream(llm, inputs[0].text, params, chat=chat, system=system)
        else:
            _run_batch(llm, inputs, params, chat=chat, system=system, as_json=as_json)


def _read_inputs(prompt: str | None, files: Sequence[Path]) -> Iterator[_Input]:
    if prompt is not None:
        yield _Input(sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt)
    for path in files:
        try:
            yield _Input(path.read_text(encoding="utf-8").removesuffix("\n"), path)
        except UnicodeDecodeError as error:
            raise RequestError(f"{path} is not UTF-8 text ({error}); convert it") from error


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system is not None else []
    return [*first, {"role": "user", "content": text}]


def _plain(text: str, system: str | None) -> str:
    return text if system is None else f"{system}\n{text}"


def _stream(llm: "LLM", text: str, params: SamplingParams, *, chat: bool, system: str | None) -> None:
    prompt = llm.render_chat(_messages(text, system)) if chat else _plain(text, system)
    params = params.replace(output_kind=RequestOutputKind.DELTA)
    answer = stream_answer(llm, prompt, params, add_special_tokens=not chat)
    if answer.interrupted:
        raise KeyboardInterrupt
    notice(answer.describe())
    _tell_kernels(llm)


def _run_batch(
    llm: "LLM",
    inputs: Sequence[_Input],
    params: SamplingParams,
    *,
    chat: bool,
    system: str | None,
    as_json: bool,
) -> None:
    """All prompts together; one that fails does not take the others with it."""
    texts, progress = [item.text for item in inputs], sys.stderr.isatty()
    if chat:
        conversations = [_messages(text, system) for text in texts]
        outputs = llm.chat(conversations, params, use_tqdm=progress, on_error="return")
    else:
        prompts = [_plain(text, system) for text in texts]
        outputs = llm.generate(prompts, params, use_tqdm=progress, on_error="return")
    for item, output in zip(inputs, outputs, strict=True):
        if as_json:
            print(json.dumps(_record(item, output), ensure_ascii=False), flush=True)
        else:
            _print_answer(item, output)
    _tell_kernels(llm)
    failed = sum(output.error is not None for output in outputs)
    if failed:
        raise typer.Exit(1 if len(outputs) == 1 else _SOME_FAILED)


def _tell_kernels(llm: "LLM") -> None:
    """Where the GPU kernels came from; nothing on a CPU."""
    counters = llm.kernel_counters
    if counters is not None:
        notice(
            f"kernels: {counters.kernel_cache_hits_total} from the cache, {counters.jit_compiles_total} "
            f"compiled in {counters.jit_compile_seconds_total:.1f} s"
        )


def _print_answer(item: _Input, output: "RequestOutput") -> None:
    name = str(item.file or "prompt")
    if output.error is not None:
        complain(RequestError(f"{name}: {output.error}"))
        return
    text = output.outputs[0].text
    write_text(f"==> {name} <==\n{text}" + ("" if text.endswith("\n") else "\n"))


def _record(item: _Input, output: "RequestOutput") -> dict[str, Any]:
    """What --json prints of one prompt. Times are in seconds, from when the request was queued."""
    record: dict[str, Any] = {"prompt": item.text}
    if item.file is not None:
        record["file"] = str(item.file)
    if output.error is not None:
        return {**record, "error": str(output.error)}
    completion, metrics = output.outputs[0], output.metrics
    num_tokens = len(completion.token_ids)
    record |= {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids or ()),
        "cached_tokens": output.num_cached_tokens,
        "completion_tokens": num_tokens,
    }
    if metrics is not None and metrics.finished_time is not None:
        speeds = speeds_of(output, num_tokens, metrics.arrival_time, metrics.finished_time)
        record |= {"time_to_first_token": speeds.first_token, "tokens_per_second": speeds.decode}
    return record
