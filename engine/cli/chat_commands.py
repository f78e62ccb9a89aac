"""A conversation, and the commands that look at it and change it. Knows neither model nor terminal."""

import dataclasses
import difflib
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from halimede.errors import RequestError
from halimede.keywords import check_keywords
from halimede.scheduler.sampling_params import SamplingParams

# Sampling parameters that would change what a chat receives, not what the model says, or hold token ids.
_NOT_SETTABLE = (
    "n",
    "logprobs",
    "prompt_logprobs",
    "detokenize",
    "output_kind",
    "skip_reading_prefix_cache",
    "stop_token_ids",
    "allowed_token_ids",
    "logit_bias",
)
_SETTABLE = tuple(f.name for f in dataclasses.fields(SamplingParams) if f.name not in _NOT_SETTABLE)
_LITERALS = {"none": None, "true": True, "false": False}
QUOTES = '"""'


@dataclass(slots=True)
class Conversation:
    """What was said: `turns` holds the messages of user and assistant, by turns."""

    params: SamplingParams
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self, text: str) -> list[dict[str, str]]:
        """The whole conversation as it would be with `text` as the user's next message."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, *self.turns, {"role": "user", "content": text}]

    def add(self, text: str, answer: str) -> None:
        """Keep a message and its answer."""
        self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


class LeaveChat(Exception):
    """The user wants to end the chat."""


@dataclass(frozen=True, slots=True)
class Command:
    """run: takes the conversation and what stands after the command, returns what to tell the user."""

    names: tuple[str, ...]
    argument: str
    help: str
    run: Callable[[Conversation, str], str]


def run_command(conversation: Conversation, text: str) -> str:
    """Carry out a message that begins with a slash; returns what to tell the user.

    Raises RequestError or ConfigError, with nothing changed, for what cannot be done; LeaveChat at the end.
    """
    word, _, argument = text.strip().partition(" ")
    for command in COMMANDS:
        if word in command.names:
            return command.run(conversation, argument.strip())
    known = [name for command in COMMANDS for name in command.names]
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else "/help lists the commands;"
    raise RequestError(f"unknown command {word!r}; {hint} a message may begin with a slash after a space")


def unquote(text: str) -> str:
    """The text inside of triple quotes; the text itself if it is not one block of them."""
    inner = text.strip()
    if len(inner) < 2 * len(QUOTES) or not (inner.startswith(QUOTES) and inner.endswith(QUOTES)):
        return text
    inner = inner[len(QUOTES) : -len(QUOTES)]
    return text if QUOTES in inner else inner.removeprefix("\n").removesuffix("\n")


def is_open_block(text: str) -> bool:
    """Whether a message, or a command's argument, has begun a block of triple quotes and not ended it."""
    start = text.lstrip()
    if start.startswith("/"):
        start = start.partition(" ")[2].lstrip()
    return start.startswith(QUOTES) and QUOTES not in start[len(QUOTES) :]


def _system(conversation: Conversation, argument: str) -> str:
    if not argument:
        shown = conversation.system
        return "no system message; /system TEXT sets one" if shown is None else f"system message: {shown}"
    # Someone who types /system "Be brief." does not mean the quotes.
    quoted = len(argument) >= 2 and argument[0] == argument[-1] == '"' and not argument.startswith(QUOTES)
    text = argument[1:-1] if quoted else unquote(argument)
    conversation.system = text or None
    return "system message set" if text else "system message removed"


def _reset(conversation: Conversation, argument: str) -> str:
    count = len(conversation.turns) // 2
    conversation.turns.clear()
    return f"conversation forgotten ({count} {'turn' if count == 1 else 'turns'}); the system message stays"


def _params(conversation: Conversation, argument: str) -> str:
    if argument:
        conversation.params = conversation.params.replace(**_parse_params(argument))
    width = max(map(len, _SETTABLE))
    return "\n".join(f"{name:{width}}  {_show(getattr(conversation.params, name))}" for name in _SETTABLE)


def _parse_params(argument: str) -> dict[str, Any]:
    try:
        words = shlex.split(argument)
    except ValueError as error:
        raise RequestError(f"{argument!r} cannot be read ({error}); close the quotes") from error
    changes = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise RequestError(f"{word!r} sets nothing; write /params temperature=0.2 max_tokens=100")
        check_keywords([name], _SETTABLE, "/params")
        changes[name] = _parse_value(value)
    return changes


def _parse_value(text: str) -> Any:
    """A number, a list, true, false or none as such; anything else is a string."""
    if text.lower() in _LITERALS:
        return _LITERALS[text.lower()]
    try:
        return json.loads(text)
    except ValueError:
        return text


def _show(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _help(conversation: Conversation, argument: str) -> str:
    lines = [(f"{', '.join(c.names)} {c.argument}".rstrip(), c.help) for c in COMMANDS]
    lines += [
        (f"{QUOTES}...{QUOTES}", "a message of several lines; so does a backslash at a line's end"),
        ("Ctrl-C", "stop the answer"),
        ("Ctrl-D", "end the chat"),
    ]
    width = max(len(usage) for usage, _ in lines)
    return "\n".join(f"{usage:{width}}  {text}" for usage, text in lines)


def _leave(conversation: Conversation, argument: str) -> str:
    raise LeaveChat


COMMANDS = (
    Command(("/system",), "[TEXT]", 'show or set the system message; "" removes it', _system),
    Command(("/reset", "/clear"), "", "forget the conversation", _reset),
    Command(("/params",), "[NAME=VALUE ...]", "show or set sampling parameters", _params),
    Command(("/help", "/?"), "", "show this", _help),
    Command(("/bye", "/exit", "/quit"), "", "end the chat", _leave),
)
"""Everything that a message beginning with a slash can mean."""
