"""Where a chat's messages come from: a terminal with line editing, or a pipe with one message per line."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from halimede.engine.cli.chat_commands import is_open_block
from halimede.engine.cli.terminal import notice

if TYPE_CHECKING:
    from prompt_toolkit.formatted_text import AnyFormattedText
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

_PROMPT, _CONTINUATION = ">>> ", "... "
_PLACEHOLDER = "Send a message (/help for help)"
_LEAVE_HINT = "Ctrl-D or /bye ends the chat."


class MessageSource(Protocol):
    """Messages of the user. interactive: whether someone is there to correct a mistake."""

    interactive: bool

    def read(self) -> str:
        """The next message, perhaps of several lines. Raises EOFError when there are no more."""
        ...


def open_messages(commands: Sequence[str], *, keep_history: bool) -> MessageSource:
    """The terminal if standard input is one, with `commands` completed at Tab, else a pipe."""
    if sys.stdin.isatty():
        return TerminalMessages(commands, default_history_file() if keep_history else None)
    return PipedMessages(sys.stdin)


def default_history_file() -> Path:
    """Where the messages typed at a terminal are kept."""
    return Path.home() / ".local" / "state" / "halimede" / "chat_history"


class PipedMessages:
    """One message per line; a block in triple quotes or backslashes at line ends join several."""

    interactive = False

    def __init__(self, lines: TextIO) -> None:
        self._lines = lines

    def read(self) -> str:
        """The next message that is not blank."""
        text = ""
        for line in self._lines:
            text += line.removesuffix("\n").removesuffix("\r")
            if is_open_block(text):
                text += "\n"
            elif text.endswith("\\"):
                text = text[:-1] + "\n"
            elif text.strip():
                return text
            else:
                text = ""
        if text.strip():  # the input has ended in the middle of a block
            return text
        raise EOFError


class TerminalMessages:
    """Line editing, history and completion of commands. Enter sends, unless a block is open.

    history_file: created for its owner alone; None, or a file that cannot be written: not kept.
    """

    interactive = True

    def __init__(self, commands: Sequence[str], history_file: Path | None) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.output import create_output
        from prompt_toolkit.shortcuts import CompleteStyle

        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            key_bindings=_key_bindings(),
            prompt_continuation=_CONTINUATION,
            placeholder=_placeholder,
            history=_open_history(history_file),
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,  # reserves no space below the prompt
            output=create_output(always_prefer_tty=True),  # standard output may be a file
        )

    def read(self) -> str:
        """The next message that is not blank. Ctrl-C clears it, or says how to leave."""
        while True:
            try:
                text = self._session.prompt(_PROMPT)
            except KeyboardInterrupt:
                if not self._session.default_buffer.text:
                    notice(_LEAVE_HINT)
                continue
            if text.strip():
                return text


def _placeholder() -> "AnyFormattedText":
    """Shown in an empty line, but not left behind when the line is done."""
    from prompt_toolkit.application import get_app

    return [] if get_app().is_done else [("fg:ansibrightblack", _PLACEHOLDER)]


def _key_bindings() -> "KeyBindings":
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.key_binding.key_processor import KeyPressEvent

    bindings = KeyBindings()

    @bindings.add("enter", filter=has_focus(DEFAULT_BUFFER))
    def enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            # Taken out here and not when the message is read: in pasted text backslashes stay.
            buffer.delete_before_cursor(1)
            buffer.insert_text("\n")
        elif is_open_block(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter", filter=has_focus(DEFAULT_BUFFER))
    def alt_enter(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def _open_history(path: Path | None) -> "History":
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))
