"""One answer, written to standard output while it is generated, and what can be said of it afterwards."""

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from halimede.engine.cli.terminal import write_text
from halimede.scheduler.sampling_params import SamplingParams

if TYPE_CHECKING:
    from halimede.engine.input_processor import Prompt
    from halimede.engine.llm import LLM
    from halimede.engine.outputs import RequestOutput


@dataclass(slots=True)
class Answer:
    """What has come so far. Times are in seconds of time.monotonic(); interrupted: Ctrl-C ended it."""

    started: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    text: str = ""
    num_tokens: int = 0
    interrupted: bool = False
    last: "RequestOutput | None" = None

    def add(self, output: "RequestOutput") -> str:
        """Take in an output that holds only what is new; returns its text."""
        self.last = output
        new = "".join(completion.text for completion in output.outputs)
        self.text += new
        self.num_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        return new

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt; 0 before the first output."""
        return len(self.last.prompt_token_ids or ()) if self.last else 0

    def describe(self) -> str:
        """Counts and speeds in a line."""
        if self.last is None:
            return "[stopped before the first token]"
        speeds = speeds_of(self.last, self.num_tokens, self.started, self.ended)
        cached = self.last.num_cached_tokens
        prompt = f"{self.num_prompt_tokens} prompt tokens" + (f" ({cached} cached)" if cached else "")
        first = "-" if speeds.first_token is None else f"{speeds.first_token:.2f} s"
        decode = "-" if speeds.decode is None else f"{speeds.decode:.1f} tok/s"
        reason = self.last.outputs[0].finish_reason if self.last.outputs else None
        end = "stopped" if self.interrupted else f"finished: {reason}"
        return f"[{prompt}, first token after {first}; {self.num_tokens} tokens, {decode}; {end}]"


@dataclass(frozen=True, slots=True)
class Speeds:
    """first_token: seconds to the first token. decode: tokens per second after it. None: it did not come."""

    first_token: float | None
    decode: float | None


def speeds_of(output: "RequestOutput", num_tokens: int, started: float, ended: float) -> Speeds:
    """Speeds of a request that ran from `started` to `ended`."""
    first = output.metrics.first_token_time if output.metrics else None
    if first is None:
        return Speeds(None, None)
    decode = (num_tokens - 1) / (ended - first) if num_tokens > 1 and ended > first else None
    return Speeds(first - started, decode)


def stream_answer(
    llm: "LLM", prompt: "Prompt", params: SamplingParams, *, add_special_tokens: bool
) -> Answer:
    """Generate an answer and write it as it comes; Ctrl-C ends it and leaves the engine as it was.

    `params` must ask for DELTA outputs.
    """
    answer = Answer()
    # Leaving the loop for whatever reason must end the request: the stream is closed, not left to be found.
    stream = cast(
        "Generator[RequestOutput]", llm.stream(prompt, params, add_special_tokens=add_special_tokens)
    )
    try:
        with closing(stream):
            for output in stream:
                write_text(answer.add(output))
    except KeyboardInterrupt:
        answer.interrupted = True
    finally:
        answer.ended = time.monotonic()
        if answer.num_tokens and not answer.text.endswith("\n"):
            write_text("\n")
    return answer


def has_chat_template(llm: "LLM") -> bool:
    """Whether messages can be rendered for the model."""
    return bool(llm.get_tokenizer().chat_template or llm.config.chat_template)
