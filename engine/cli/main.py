"""`halimede`: entry point of the command line. Heavy imports wait until a command needs them."""

import logging
import sys
from typing import Annotated

import typer

from halimede import __version__
from halimede.engine.cli.generate import generate
from halimede.engine.cli.options import with_options
from halimede.errors import HalimedeError

app = typer.Typer(
    name="halimede",
    help="Serve large language models with kernels that are all Triton.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's tables cut long option names off in a narrow terminal
)
app.command("generate", no_args_is_help=True)(with_options(generate))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"halimede {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what the engine does.")] = False,
) -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("halimede").setLevel(logging.INFO if verbose else logging.WARNING)


def main() -> None:
    """Run a command. Exit status: 0 done, 1 the command failed, 2 wrong usage, 130 interrupted."""
    try:
        app()
    except HalimedeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
