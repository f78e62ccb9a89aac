"""`halimede tune MODEL`: measures on a GPU which configs of its kernels are fastest for the model."""

import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halimede.engine.cli.completion import complete_model
from halimede.engine.cli.kernel_targets import targets_named
from halimede.engine.cli.table import print_rows
from halimede.engine.cli.terminal import notice
from halimede.engine.cli.warmup_progress import Progress
from halimede.engine.config import EngineConfig
from halimede.errors import KernelError

if TYPE_CHECKING:
    from halimede.kernels.spec import Case, KernelSpec
    from halimede.kernels.specialise import Specialisation
    from halimede.kernels.store import KernelStore
    from halimede.kernels.target import Target
    from halimede.kernels.tune import Built, Tools, Tuned
    from halimede.kernels.tune_bench import Bench
    from halimede.kernels.tune_journal import Journal
    from halimede.kernels.tune_space import Tunable
    from halimede.kernels.tuning import KernelConfig

SIZES = (1, 16, 32, 64, 128, 256, 1024, 4096)
"""Tokens of the steps whose launches are tuned, up to the largest batch."""

_TITLES = ("Kernel", "Shape", "Bucket", "Own choice, us", "Tuned, us", "Gain", "Config")

_Model = Annotated[
    str,
    typer.Argument(
        help="As for serving, or only its config.json: weights are not needed.",
        autocompletion=complete_model,
    ),
]
_Kernels = Annotated[
    str, typer.Option("--kernels", help="Names with commas between; default: all that can be tuned.")
]
_Target = Annotated[str, typer.Option("--target", "-t", help="auto, or what the GPU of this machine is.")]
_MaxBatch = Annotated[
    int | None,
    typer.Option("--max-batch", min=1, help="Most tokens of a step; default: --max-num-batched-tokens."),
]
_Budget = Annotated[
    float | None,
    typer.Option("--budget", min=0, help="Seconds for measuring, after all is compiled; default: no end."),
]
_Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="The table; default: tuned/TARGET.json in the kernel cache."),
]
_Resume = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Go on with what an earlier run has measured.")
]


def tune(
    model: _Model,
    kernels: _Kernels = "",
    target: _Target = "auto",
    max_batch: _MaxBatch = None,
    budget: _Budget = None,
    output: _Output = None,
    resume: _Resume = True,
    *,
    engine: dict[str, Any],
) -> None:
    """Find the fastest configs of the kernels that serving MODEL with these settings launches.

    Needs a GPU, which nothing else should use meanwhile. What is clearly faster than a kernel's own choice
    goes into a table that serving and `halimede warmup` follow; run warmup again afterwards.
    """
    here = _target_here(target)
    config = EngineConfig(model=model, **{"load_format": "dummy", **engine})
    from halimede.engine.warmup.serving import kernel_cache_folder
    from halimede.kernels.tuning import user_table_path

    path = output or user_table_path(kernel_cache_folder(config), here.name)
    tunables = find(config, here, [name for name in kernels.split(",") if name], max_batch)
    if not tunables:
        notice(f"serving {model} launches no kernel that can be tuned")
        return
    run(tunables, here, path, budget=math.inf if budget is None else budget, resume=resume)


def find(
    config: EngineConfig, target: "Target", names: Sequence[str], max_batch: int | None
) -> "list[Tunable]":
    """What can be tuned of all that serving launches. names: of kernels; all if there are none.

    KernelError for a name that is no kernel's that can be tuned.
    """
    import torch

    from halimede.engine.build import open_model
    from halimede.engine.executor.settings import resolve_settings
    from halimede.engine.warmup.specialisations import serving_launches
    from halimede.kernels.spec import all_kernels
    from halimede.kernels.tune_space import find_tunables, tunable_specs

    specs = tunable_specs(all_kernels(), names)
    most = min(max_batch or config.max_num_batched_tokens, config.max_num_batched_tokens)
    limited = replace(config, max_num_batched_tokens=most, max_num_seqs=min(config.max_num_seqs, most))
    _, model_config = open_model(config)
    settings = resolve_settings(config, model_config, torch.device("meta"))
    sizes = [size for size in SIZES if size <= most]
    launches = serving_launches(limited, model_config, settings, target, sizes)
    return find_tunables(launches, target, specs)


def run(tunables: "Sequence[Tunable]", target: "Target", path: Path, *, budget: float, resume: bool) -> None:
    """Tune on the current GPU, write the table after each line of it, and print what was found."""
    from halimede.kernels.library import KernelLibrary, using
    from halimede.kernels.store import KernelStore
    from halimede.kernels.tune import tune as search
    from halimede.kernels.tune_journal import Journal

    # Not in the cache itself: hundreds of kernels that nobody will serve with.
    store = KernelStore(path.with_name(f"{path.stem}.candidates"))
    journal = Journal(path.with_name(f"{path.stem}.journal"), resume=resume)
    tools = _tools(target, store, journal)
    done = []
    with using(KernelLibrary(store)):
        for tuned in search(tunables, target, tools, budget=budget):
            done.append(tuned)
            write(done, path)
            notice(describe(tuned))
    report(done, path)
    if all(tuned.is_complete for tuned in done):
        shutil.rmtree(store.folder, ignore_errors=True)


def _tools(target: "Target", store: "KernelStore", journal: "Journal") -> "Tools":
    """Of the current GPU."""
    import torch

    from halimede.engine.warmup.pool import default_jobs
    from halimede.kernels.tune import Tools

    device = torch.device("cuda", torch.cuda.current_device())
    return Tools(
        build=partial(_build, store=store, jobs=default_jobs()),
        open_bench=partial(_open_bench, target=target, device=device),
        journal=journal,
        device=torch.cuda.get_device_name(device),
    )


def write(done: "Sequence[Tuned]", path: Path) -> None:
    """Put what was found into the table."""
    from halimede.kernels.tune_journal import update_table_file

    update_table_file(
        path,
        {
            (tuned.tunable.spec.name, tuned.tunable.key, tuned.tunable.size): (
                tuned.chosen,
                tuned.is_better,
            )
            for tuned in done
            if tuned.problem is None
        },
    )


def describe(tuned: "Tuned") -> str:
    """A line for people while the search goes on."""
    tunable = tuned.tunable
    name = f"{tunable.spec.name} {tunable.key} {tunable.size}"
    start = f"{name}: {tuned.measured} of {len(tunable.configs)} configs measured"
    left_out = "".join(f", {count}: {reason}" for reason, count in sorted(tuned.left_out.items()))
    if tuned.problem is not None:
        return f"{start}{left_out}; its own choice cannot be measured: {tuned.problem}"
    return start + left_out + ("" if tuned.is_complete else "; the budget was not enough for the others")


def report(done: "Sequence[Tuned]", path: Path) -> None:
    """The table of what was found, a row for each shape, and what to do with it."""
    from halimede.kernels.tune_space import config_id

    rows = [
        (
            tuned.tunable.spec.name,
            timing.case,
            str(tuned.tunable.size),
            f"{timing.own * 1e6:.1f}",
            f"{timing.chosen * 1e6:.1f}",
            f"{timing.own / timing.chosen:.2f}x",
            config_id(tuned.chosen),
        )
        for tuned in done
        for timing in tuned.timings
    ]
    print_rows(_TITLES, rows)
    better = sum(tuned.is_better for tuned in done)
    notice(
        f"{better} of {len(done)} choices are better now, in {path}; "
        + ("run `halimede warmup` again to build their kernels" if better else "nothing changes for serving")
    )


def _target_here(name: str) -> "Target":
    """The GPU at hand; KernelError if there is none, or it is not what `name` says."""
    import torch

    from halimede.kernels.target import target_of_device

    if not torch.cuda.is_available():
        raise KernelError(
            "tuning measures kernels on a GPU, and torch finds none here; run it on the machine that serves"
        )
    here = target_of_device(torch.device("cuda", torch.cuda.current_device()))
    if name != "auto" and [one.machine for one in targets_named(name)] != [here.machine]:
        raise KernelError(
            f"tuning measures on the GPU at hand, which is {here.machine}, so it cannot tune for {name}; "
            "leave --target out, or run it on such a machine"
        )
    return here


def _build(specialisations: "Sequence[Specialisation]", *, store: "KernelStore", jobs: int) -> "Built":
    from halimede.engine.warmup.pool import build_all
    from halimede.kernels.specialise import TRITON_VERSION

    with Progress(jobs) as progress:
        summary = build_all(
            specialisations, store, jobs=jobs, on_start=progress.start, on_done=progress.advance
        )
    failed: Mapping[str, str] = {one.key: error for one, error in summary.failed}
    built: dict[str, Any] = dict(failed)
    for one in specialisations:
        if one.key not in failed:
            found = store.read(TRITON_VERSION, one.target.machine, one.key)
            built[one.key] = "it was removed while tuning" if found is None else found[0]
    return built


def _open_bench(
    spec: "KernelSpec", case: "Case", own: "KernelConfig", *, target: "Target", device: Any
) -> "AbstractContextManager[Bench]":
    from halimede.kernels.tune_bench import gpu_bench

    return gpu_bench(spec, case, own, target, device)
