"""What commands write beside their result: notices and errors on standard error, text that cannot harm."""

import io
import sys

# A model may emit any bytes; escape sequences could retitle, recolour or reprogram the terminal.
_CONTROLS = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"
}


def replace_what_cannot_be_encoded() -> None:
    """Let standard input and output show a replacement for what their encoding lacks, and not crash."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def write_text(text: str) -> None:
    """Text of a model, to standard output at once; on a terminal without its control characters."""
    print(text.translate(_CONTROLS) if sys.stdout.isatty() else text, end="", flush=True)


def notice(text: str, style: str = "dim") -> None:
    """A line on standard error, in rich's `style` where that is a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    console.print(Text(text, style=style), soft_wrap=not console.is_terminal)


def complain(error: Exception) -> None:
    """An error that does not end the command."""
    notice(f"error: {error}", style="red")
