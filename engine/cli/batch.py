"""`halimede batch -i in.jsonl -o out.jsonl --model M`: a file of requests, offline."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halimede.engine.cli.completion import complete_model
from halimede.engine.config import EngineConfig

if TYPE_CHECKING:
    from halimede.engine.batch.run import Batch, BatchSummary

_SOME_FAILED = 3


_Input = Annotated[
    str,
    typer.Option(
        "--input-file", "-i", help="Requests, one per line, in OpenAI's batch format; - is standard input."
    ),
]
_Output = Annotated[
    str,
    typer.Option(
        "--output-file",
        "-o",
        help="Results, one per line, appended as they come; - is standard output (not resumable).",
    ),
]
_Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A directory, a .gguf file or a Hugging Face id (repo:QUANT picks a GGUF).",
        autocompletion=complete_model,
    ),
]


def batch(
    input: _Input,
    output: _Output,
    model: _Model,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Start anew; without it, lines that have a result are skipped."),
    ] = False,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="Another name that a request's 'model' may have; may be repeated."),
    ] = None,
    progress: Annotated[bool, typer.Option("--progress/--no-progress", help="Show how far it is.")] = True,
    *,
    engine: dict[str, Any],
) -> None:
    """Run a file of chat and completion requests and write a file of results.

    A request that is not valid gives a result with its error, and the others go on. After an interruption of
    any kind the same command goes on where it stopped. To have failed requests run again, delete their lines
    from the results.

    Exit status: 0 every line has succeeded, 3 some have failed, 1 the run failed, 2 wrong usage,
    130 interrupted.
    """
    from halimede.engine.batch.run import Batch

    EngineConfig(model=model, **engine)  # a bad value is told before the files are read
    with Batch(input, output, overwrite=overwrite) as job:
        try:
            _run(job, model, engine, served_model_name or (), show_progress=progress)
        except KeyboardInterrupt:
            print(_interrupted(job.summary, output), file=sys.stderr)
            raise
    print(_describe(job.summary), file=sys.stderr)
    if job.summary.num_failed:
        raise typer.Exit(_SOME_FAILED)


def _run(
    job: "Batch", model: str, engine: dict[str, Any], names: Sequence[str], *, show_progress: bool
) -> None:
    """Run what is left; a model is loaded only if that is something."""
    done, total = job.summary.num_done, job.summary.num_lines
    if done:
        print(f"{done} of {total} lines have results already", file=sys.stderr)
    if done < total:
        from halimede import LLM

        with LLM(model, **engine) as llm:
            job.run(llm, served_model_names=names, show_progress=show_progress)


def _interrupted(summary: "BatchSummary", output: str) -> str:
    done = f"interrupted after {summary.num_done} of {summary.num_lines} lines"
    return done if output == "-" else f"{done}; the same command goes on from what is in {output}"


def _describe(summary: "BatchSummary") -> str:
    num_succeeded = summary.num_lines - summary.num_failed
    counts = f"{summary.num_lines} lines: {num_succeeded} succeeded, {summary.num_failed} failed"
    if summary.num_resumed == summary.num_lines:
        return counts
    speed = summary.output_tokens / max(summary.seconds, 1e-9)
    return (
        f"{counts}; this run read {summary.prompt_tokens} tokens and wrote {summary.output_tokens} in "
        f"{summary.seconds:.1f} s ({speed:.1f} tok/s)"
    )
