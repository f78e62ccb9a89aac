"""Compiles in all cores what a stage will launch: one after the other, when first used, takes minutes."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from halimede.engine.build import open_model
from halimede.engine.config import EngineConfig
from halimede.engine.executor.device import resolve_device
from halimede.engine.executor.settings import resolve_settings
from halimede.engine.warmup.pool import build_all, default_jobs
from halimede.engine.warmup.specialisations import serving_specialisations
from halimede.kernels.cache_dir import default_kernel_cache_dir
from halimede.kernels.launch import Launch, intercepting
from halimede.kernels.specialise import Specialisation
from halimede.kernels.store import KernelStore
from halimede.kernels.target import target_of_device


def build_for_calls(calls: Iterable[Callable[[], Any]], device: torch.device) -> None:
    """Build what the calls launch, which are made with tensors of the CPU or of "meta"; nothing runs.

    A call that fails is left for its turn: then it is known whose fault it is.
    """
    if device.type != "cuda":
        return
    target = target_of_device(device)
    found: dict[str, Specialisation] = {}

    def note(launch: Launch) -> None:
        one = launch.specialise(target)
        found.setdefault(one.key, one)

    with intercepting(target, note), torch.inference_mode():
        for call in calls:
            try:
                call()
            except Exception as error:
                print(f"not compiled ahead: {type(error).__name__}: {str(error)[:200]}", flush=True)
    _build(found.values())


def build_for_engines(configs: Iterable[EngineConfig], device: torch.device) -> None:
    """Build what engines of these settings launch."""
    if device.type != "cuda":
        return
    target = target_of_device(device)
    found: dict[str, Specialisation] = {}
    for config in configs:
        _, model = open_model(config)
        settings = resolve_settings(config, model, resolve_device(config.device))
        found |= {one.key: one for one in serving_specialisations(config, model, settings, target)}
    _build(found.values())


def _build(wanted: Iterable[Specialisation]) -> None:
    folder: Path = default_kernel_cache_dir()
    done = build_all(list(wanted), KernelStore(folder), jobs=default_jobs())
    failed = "".join(f"\n  {one.name}: {error.splitlines()[0]}" for one, error in done.failed)
    print(
        f"compiled ahead: {done.compiled} kernels in {done.seconds:.1f} s, {done.cached} were there{failed}",
        flush=True,
    )
