"""`halimede bench`: throughput, latency and start-up of the engine, with options as in `vllm bench`."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halimede.engine.cli.options import ModelArgument, with_engine_options

if TYPE_CHECKING:
    from halimede.engine.llm import LLM

app = typer.Typer(
    help="Measure the engine: throughput, latency, start-up.", no_args_is_help=True, rich_markup_mode=None
)

_InputLen = Annotated[int, typer.Option("--input-len", min=1, help="Tokens of each random prompt.")]
_OutputLen = Annotated[int, typer.Option("--output-len", min=1, help="Tokens to generate for each.")]
_OutputJson = Annotated[
    Path | None, typer.Option("--output-json", dir_okay=False, help="Write all numbers to this file, too.")
]
_NoText = Annotated[
    bool, typer.Option("--disable-detokenize", help="Make no text: load no tokenizer, leave its time out.")
]


def throughput(
    model: ModelArgument,
    input_len: _InputLen = 1024,
    output_len: Annotated[
        int | None,
        typer.Option(
            "--output-len", min=1, help="Tokens to generate for each; default: 128, or the dataset's."
        ),
    ] = None,
    num_prompts: Annotated[int, typer.Option("--num-prompts", min=1, help="Requests.")] = 100,
    dataset_path: Annotated[
        Path | None,
        typer.Option(
            "--dataset-path",
            exists=True,
            dir_okay=False,
            help="Requests instead of random prompts: JSON lines as for OpenAI's batch API or with a prompt "
            "each, or ShareGPT's JSON.",
        ),
    ] = None,
    disable_detokenize: _NoText = False,
    output_json: _OutputJson = None,
    *,
    engine: dict[str, Any],
) -> None:
    """Tokens per second of many requests that are all there at the start.

    Every request generates exactly its number of tokens: end-of-sequence tokens stop nothing.
    """
    from halimede.engine.cli.bench_prompts import random_requests, read_dataset
    from halimede.engine.cli.bench_runs import measure_throughput

    with _open(model, engine, disable_detokenize and dataset_path is None) as llm:
        if dataset_path is not None:
            requests = read_dataset(llm, dataset_path, num_prompts, output_len)
        else:
            source = random.Random(llm.config.seed)
            requests = random_requests(llm, num_prompts, input_len, output_len or 128, source)
        results = measure_throughput(llm, requests, show_progress=True).as_json()
    _show_throughput(results)
    settings: dict[str, Any] = {"input_len": input_len, "output_len": output_len}
    settings["num_prompts"] = num_prompts
    settings["dataset_path"] = None if dataset_path is None else str(dataset_path)
    _write(output_json, "throughput", model, engine, settings, results)


def latency(
    model: ModelArgument,
    input_len: _InputLen = 32,
    output_len: _OutputLen = 128,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Requests that run together.")] = 8,
    num_iters_warmup: Annotated[int, typer.Option(min=0, help="Batches before those that count.")] = 3,
    num_iters: Annotated[int, typer.Option(min=1, help="Batches that count.")] = 10,
    disable_detokenize: _NoText = False,
    output_json: _OutputJson = None,
    *,
    engine: dict[str, Any],
) -> None:
    """Seconds that one batch takes from the prompts to its last token.

    Each batch has prompts of its own, so that the prefix cache does not shorten the later ones.
    """
    from halimede.engine.cli.bench_prompts import random_requests
    from halimede.engine.cli.bench_runs import measure_latency, percentiles

    with _open(model, engine, disable_detokenize) as llm:
        source = random.Random(llm.config.seed)
        batches = [
            random_requests(llm, batch_size, input_len, output_len, source)
            for _ in range(num_iters_warmup + num_iters)
        ]
        seconds = measure_latency(llm, batches)[num_iters_warmup:]
    spread = percentiles(seconds)
    tokens = batch_size * output_len
    results = {
        "avg_latency": spread["mean"],
        "latencies": seconds,
        "percentiles": {name: value for name, value in spread.items() if name != "mean"},
        "output_tokens_per_batch": tokens,
        "output_tokens_per_second": tokens / spread["mean"],
    }
    _show_percentiles(
        f"{num_iters} batches of {batch_size} x ({input_len} + {output_len}) tokens; "
        f"{results['output_tokens_per_second']:,.1f} output tokens per second; milliseconds",
        {"a batch": spread, "per output token": {name: value / output_len for name, value in spread.items()}},
    )
    settings = {"input_len": input_len, "output_len": output_len, "batch_size": batch_size}
    settings |= {"num_iters_warmup": num_iters_warmup, "num_iters": num_iters}
    _write(output_json, "latency", model, engine, settings, results)


def startup(
    model: ModelArgument,
    num_iters_cold: Annotated[int, typer.Option(min=1, help="Fresh processes that start the engine.")] = 3,
    input_len: _InputLen = 32,
    disable_detokenize: _NoText = False,
    output_json: _OutputJson = None,
    *,
    engine: dict[str, Any],
) -> None:
    """Seconds from the start of a process to the first token, stage by stage.

    The first process finds the files on disk; the ones after it find them in the system's cache.
    """
    from halimede.engine.cli.bench_startup import STAGES, measure_startup
    from halimede.engine.config import EngineConfig

    EngineConfig(model=model, **engine)  # a bad setting is told here, not by another process
    has_tokenizer = not _skips_tokenizer(engine, disable_detokenize)
    runs = [measure_startup(model, engine, input_len, tokenizer=has_tokenizer) for _ in range(num_iters_cold)]
    rows = []
    for stage in (*STAGES, "total"):
        seconds = [run[stage] for run in runs]
        row = (median(seconds), min(seconds), max(seconds), seconds[0])
        rows.append((stage.replace("_", " "), *(f"{value:.3f}" for value in row)))
    header = ("stage", "median s", "min s", "max s", "first process s")
    _show_rows(f"Start of {num_iters_cold} fresh processes", header, rows)
    medians = {stage: median(run[stage] for run in runs) for stage in (*STAGES, "total")}
    settings = {"num_iters_cold": num_iters_cold, "input_len": input_len}
    _write(output_json, "startup", model, engine, settings, {"median": medians, "processes": runs})


for _command in (throughput, latency, startup):
    app.command(_command.__name__, no_args_is_help=True)(with_engine_options(_command))


def _open(model: str, engine: Mapping[str, Any], disable_detokenize: bool) -> "LLM":
    from halimede import LLM

    return LLM(model, **engine, skip_tokenizer_init=_skips_tokenizer(engine, disable_detokenize))


def _skips_tokenizer(engine: Mapping[str, Any], disable_detokenize: bool) -> bool:
    """A dummy model may be a config.json and nothing else."""
    return disable_detokenize or engine.get("load_format") == "dummy"


def _show_throughput(results: Mapping[str, Any]) -> None:
    counts = f"{results['num_prompt_tokens']:,} prompt and {results['num_output_tokens']:,} output tokens"
    _show_rows(
        f"{results['num_requests']:,} requests, {counts} in {results['elapsed_time']:.2f} s",
        ("", "per second"),
        [
            ("requests", f"{results['requests_per_second']:,.2f}"),
            ("tokens, prompts too", f"{results['tokens_per_second']:,.1f}"),
            ("output tokens", f"{results['output_tokens_per_second']:,.1f}"),
        ],
    )
    names = {"ttft_s": "first token", "tpot_s": "per further token", "e2el_s": "whole request"}
    _show_percentiles("Milliseconds, the wait in the queue included", {names[n]: results[n] for n in names})


def _show_percentiles(title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Seconds in, milliseconds out."""
    filled = {label: values for label, values in rows.items() if values}
    header = ["", *next(iter(filled.values()), {})]
    cells = [
        (label, *(f"{1e3 * value:,.1f}" for value in values.values())) for label, values in filled.items()
    ]
    _show_rows(title, header, cells)


def _show_rows(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    console.print(title, style="bold", soft_wrap=True)
    console.print(table)


def _write(
    path: Path | None,
    benchmark: str,
    model: str,
    engine: Mapping[str, Any],
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
) -> None:
    if path is None:
        return
    content = {
        "benchmark": benchmark,
        "model": model,
        "engine": engine,
        "settings": settings,
        "results": results,
    }
    path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
