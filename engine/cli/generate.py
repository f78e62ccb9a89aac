"""`halimede generate MODEL PROMPT`: one prompt in, its answer streamed out."""

import io
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halimede.scheduler.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from halimede.engine.llm import LLM
    from halimede.engine.outputs import RequestOutput


def generate(
    model: Annotated[
        str, typer.Argument(help="A directory, a .gguf file or a Hugging Face id (repo:QUANT picks a GGUF).")
    ],
    prompt: Annotated[str, typer.Argument(help="What to answer; - reads it from standard input.")],
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is; do not apply the chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    *,
    engine: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Answer one prompt and stream the text to standard output; speeds go to standard error.

    A model with a chat template answers the prompt as a user's message; with --raw, or without a template,
    it continues the prompt's text.
    """
    # What the terminal's encoding cannot say is shown as a question mark, not as a crash.
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    text = sys.stdin.read() if prompt == "-" else prompt
    sampling = {"max_tokens": None, **sampling, "output_kind": RequestOutputKind.DELTA}
    SamplingParams(**sampling)  # a bad value is told before the model is loaded

    from halimede.engine.llm import LLM

    with LLM(model, **engine) as llm:
        params = llm.get_default_sampling_params().replace(**sampling)
        _stream(llm, text, params, raw=raw, system=system)


def _stream(llm: "LLM", text: str, params: SamplingParams, *, raw: bool, system: str | None) -> None:
    chat = not raw and bool(llm.get_tokenizer().chat_template or llm.config.chat_template)
    if chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        prompt = llm.render_chat([*messages, {"role": "user", "content": text}])
    else:
        prompt = text if system is None else f"{system}\n{text}"
    started = time.monotonic()
    count, last = 0, None
    try:
        for last in llm.stream(prompt, params, add_special_tokens=not chat):
            for completion in last.outputs:
                count += len(completion.token_ids)
                print(completion.text, end="", flush=True)
    finally:
        if count:  # the next line of the terminal, also after Ctrl-C
            print(flush=True)
    if last is not None:
        print(_speed(last, count, started), file=sys.stderr)


def _speed(last: "RequestOutput", count: int, started: float) -> str:
    now = time.monotonic()
    metrics = last.metrics
    first = metrics.first_token_time if metrics and metrics.first_token_time else now
    decode = f"{(count - 1) / (now - first):.1f} tok/s" if count > 1 and now > first else "-"
    prompt_tokens = len(last.prompt_token_ids or ())
    reason = last.outputs[0].finish_reason if last.outputs else None
    return (
        f"[{prompt_tokens} prompt tokens, first token after {first - started:.2f} s; "
        f"{count} tokens, {decode}; finished: {reason}]"
    )
