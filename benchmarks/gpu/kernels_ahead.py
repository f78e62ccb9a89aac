"""Compiles in all cores what a stage will launch: one after the other, when first used, takes minutes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from halimede.engine.build import open_model
from halimede.engine.config import EngineConfig
from halimede.engine.executor.device import resolve_device
from halimede.engine.executor.settings import resolve_settings
from halimede.engine.warmup.pool import Outcome, build_all, default_jobs
from halimede.engine.warmup.specialisations import serving_specialisations
from halimede.kernels.cache_dir import default_kernel_cache_dir
from halimede.kernels.launch import Launch, intercepting
from halimede.kernels.specialise import Specialisation
from halimede.kernels.store import KernelStore
from halimede.kernels.target import Target, target_of_device

Keyed = dict[str, Specialisation]
"""Kernels by the keys that they have in the cache."""


def launched_by(call: Callable[[], Any], target: Target) -> Keyed:
    """What a call launches, which is made with tensors of the CPU or of "meta"; nothing runs.

    A call that fails is left for its turn: then it is known whose fault it is.
    """
    found: Keyed = {}

    def note(launch: Launch) -> None:
        one = launch.specialise(target)
        found.setdefault(one.key, one)

    with intercepting(target, note), torch.inference_mode():
        try:
            call()
        except Exception as error:
            print(f"not compiled ahead: {type(error).__name__}: {str(error)[:200]}", flush=True)
    return found


def build_for_calls(calls: Iterable[Callable[[], Any]], device: torch.device) -> None:
    """Build what the calls launch; see launched_by."""
    if device.type != "cuda":
        return
    target = target_of_device(device)
    found: Keyed = {}
    for call in calls:
        found |= launched_by(call, target)
    build(found.values())


def build_for_engines(configs: Iterable[EngineConfig], device: torch.device) -> None:
    """Build what engines of these settings launch."""
    if device.type != "cuda":
        return
    target = target_of_device(device)
    found: Keyed = {}
    for config in configs:
        _, model = open_model(config)
        settings = resolve_settings(config, model, resolve_device(config.device))
        found |= {one.key: one for one in serving_specialisations(config, model, settings, target)}
    build(found.values())


def build(
    wanted: Iterable[Specialisation],
    *,
    on_start: Callable[[Sequence[Specialisation]], None] = lambda missing: None,
    on_done: Callable[[Outcome], None] = lambda outcome: None,
    spared: int = 0,
) -> None:
    """Build them into the cache that this process uses. on_start, on_done: as of build_all.

    spared: cores that have something else to do.
    """
    store, jobs = KernelStore(default_kernel_cache_dir()), max(1, default_jobs() - spared)
    done = build_all(list(wanted), store, jobs=jobs, on_start=on_start, on_done=on_done)
    failed = "".join(f"\n  {one.name}: {(error.splitlines() or [''])[0]}" for one, error in done.failed)
    print(
        f"compiled ahead: {done.compiled} kernels in {done.seconds:.1f} s by {jobs} processes, "
        f"{done.cached} were there{failed}",
        flush=True,
    )
