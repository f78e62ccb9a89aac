"""`halimede warmup MODEL --target sm_90`: builds every kernel that serving the model needs; no GPU needed."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halimede.engine.cli.completion import complete_model
from halimede.engine.cli.kernel_targets import targets_named
from halimede.engine.cli.machine import format_bytes
from halimede.engine.cli.terminal import notice
from halimede.engine.cli.warmup_progress import Progress
from halimede.engine.config import EngineConfig
from halimede.errors import KernelError

if TYPE_CHECKING:
    from halimede.engine.warmup.pool import Summary
    from halimede.kernels.specialise import Specialisation
    from halimede.kernels.target import Target

_LISTED = 20


_Model = Annotated[
    str,
    typer.Argument(
        help="As for serving, or only its config.json: weights are not needed.",
        autocompletion=complete_model,
    ),
]
_Target = Annotated[
    str,
    typer.Option(
        "--target",
        "-t",
        help="GPUs to build for: sm_90,gfx942; auto: those of this machine; all.",
    ),
]
_Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder of the cache; default: --kernel-cache-dir's."),
]
_Jobs = Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Processes; default: one per core.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def warmup(
    model: _Model,
    target: _Target = "auto",
    output: _Output = None,
    jobs: _Jobs = None,
    as_json: _Json = False,
    *,
    engine: dict[str, Any],
) -> None:
    """Compile every kernel that serving MODEL with these settings can need.

    Needs no GPU, no CUDA or ROCm toolkit and no C compiler. What the cache has already is not compiled
    again, so a run that was stopped goes on where it was. Serve from the cache with --jit forbid.
    """
    config = _config(model, engine, output)
    targets = targets_named(target)
    try:
        from halimede.engine.warmup.pool import build_all, default_jobs
        from halimede.engine.warmup.serving import kernel_cache_folder
        from halimede.kernels.store import KernelStore
        from halimede.kernels.tuning import tables_in
    except ImportError as error:
        raise KernelError(
            f"Triton, which compiles kernels, cannot be imported ({error}); pip install triton (Linux only)"
        ) from error
    folder = kernel_cache_folder(config)
    with tables_in(folder):
        wanted = _specialisations(config, targets)
    jobs = jobs or default_jobs()
    with Progress(jobs) as progress:
        try:
            summary = build_all(
                wanted, KernelStore(folder), jobs=jobs, on_start=progress.start, on_done=progress.advance
            )
        except KeyboardInterrupt:
            progress.close()
            if progress.missing is not None:
                kept = f"{len(wanted) - progress.missing} of {len(wanted)} kernels are in {folder}"
                print(f"interrupted: {kept}; the same command goes on from there", file=sys.stderr)
            raise
    if as_json:
        print(json.dumps(_record(summary, folder, targets), indent=2))
    else:
        _print(summary, folder, targets)
    if summary.failed:
        raise typer.Exit(1)


def _config(model: str, engine: dict[str, Any], output: Path | None) -> EngineConfig:
    config = EngineConfig(model=model, **{"load_format": "dummy", **engine})
    if output is None:
        return config
    if config.kernel_cache_dir is not None and Path(config.kernel_cache_dir) != output:
        raise typer.BadParameter(
            f"-o {output} contradicts --kernel-cache-dir {config.kernel_cache_dir}; leave one of them out"
        )
    return replace(config, kernel_cache_dir=str(output))


def _specialisations(config: EngineConfig, targets: "list[Target]") -> "list[Specialisation]":
    import torch

    from halimede.engine.build import open_model
    from halimede.engine.executor.settings import resolve_settings
    from halimede.engine.warmup.specialisations import serving_specialisations

    _, model_config = open_model(config)
    settings = resolve_settings(config, model_config, torch.device("meta"))
    return [
        one for target in targets for one in serving_specialisations(config, model_config, settings, target)
    ]


def _record(summary: "Summary", folder: Path, targets: "list[Target]") -> dict[str, Any]:
    return {
        "folder": str(folder),
        "targets": [target.machine for target in targets],
        "compiled": summary.compiled,
        "cached": summary.cached,
        "failed": [
            {"kernel": one.name, "target": one.target.machine, "key": one.key, "error": error}
            for one, error in summary.failed
        ],
        "seconds": round(summary.seconds, 3),
        "bytes": summary.bytes,
    }


def _print(summary: "Summary", folder: Path, targets: "list[Target]") -> None:
    from halimede.kernels.library import describe

    for one, error in summary.failed[:_LISTED]:
        notice(f"failed: {describe(one)}: {error}", style="red")
    if len(summary.failed) > _LISTED:
        notice(f"... and {len(summary.failed) - _LISTED} more; --json lists all", style="red")
    names = ", ".join(target.machine for target in targets)
    print(
        f"{summary.compiled} compiled, {summary.cached} cached, {len(summary.failed)} failed in "
        f"{summary.seconds:.1f} s; {format_bytes(summary.bytes)} for {names} in {folder}"
    )
