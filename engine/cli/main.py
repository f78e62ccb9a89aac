"""`halimede`: entry point of the command line. Heavy imports wait until a command needs them."""

import logging
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from halimede import __version__
from halimede.engine.cli.batch import batch
from halimede.engine.cli.bench import app as bench
from halimede.engine.cli.chat import chat
from halimede.engine.cli.doctor import doctor
from halimede.engine.cli.generate import generate
from halimede.engine.cli.kernels import app as kernels
from halimede.engine.cli.models import models
from halimede.engine.cli.options import with_engine_options, with_options
from halimede.engine.cli.quantize import quantize
from halimede.engine.cli.tune import tune
from halimede.engine.cli.warmup import warmup
from halimede.errors import HalimedeError

# \b: the lines stay as they are.
_EPILOG = """\b
Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted,
3 some of several requests failed."""

app = typer.Typer(
    name="halimede",
    help="Serve large language models with kernels that are all Triton.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's tables cut long option names off in a narrow terminal
)
app.command("chat", no_args_is_help=True)(with_options(chat))
app.command("generate", no_args_is_help=True)(with_options(generate))
app.command("batch", no_args_is_help=True, short_help="Run a file of requests, offline.")(
    with_engine_options(batch)
)
app.command("warmup", no_args_is_help=True, short_help="Build a model's GPU kernels, without a GPU.")(
    with_engine_options(warmup)
)
app.command("tune", no_args_is_help=True, short_help="Find a model's fastest kernel configs, on a GPU.")(
    with_engine_options(tune)
)
app.command("quantize", no_args_is_help=True, short_help="Write a quantized checkpoint of a plain one.")(
    quantize
)
app.add_typer(bench, name="bench")
app.add_typer(kernels, name="kernels")
app.command("models")(models)
app.command("doctor")(doctor)

# Options of the whole program that people write after the command, too.
_ANYWHERE = ("--debug", "--verbose", "-v")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"halimede {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what the engine does (also after the command).")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks of errors (also after the command).")
    ] = False,
) -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("halimede").setLevel(logging.INFO if verbose else logging.WARNING)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; `arguments` are the process's if not given. Ends by SystemExit with the exit status."""
    general, rest = _split_general(sys.argv[1:] if arguments is None else arguments)
    try:
        app([*general, *rest])  # handles wrong usage, Ctrl-C and a closed standard output itself
    except Exception as error:
        if "--debug" in general:
            traceback.print_exc()
        print(_describe(error), file=sys.stderr)
        sys.exit(1)


def _split_general(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of _ANYWHERE that stand before a --, and all other arguments."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    general = [option for option in _ANYWHERE if option in arguments[:end]]
    rest = [argument for argument in arguments[:end] if argument not in _ANYWHERE]
    return general, [*rest, *arguments[end:]]


def _describe(error: Exception) -> str:
    if isinstance(error, HalimedeError):
        return f"error: {error}"
    if isinstance(error, OSError):  # a full disk, a file that may not be read: not a bug
        return f"error: {error}; run again with --debug to see where this was"
    return (
        f"internal error: {type(error).__name__}: {error}; run again with --debug for the traceback and "
        "please report it"
    )


if __name__ == "__main__":
    main()
