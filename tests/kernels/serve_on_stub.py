"""Serves a tiny model on a GPU driver that only pretends, with the kernels of a cache, in its own process.

    python serve_on_stub.py FOLDER_WITH_CONFIG TARGET LIBRARY CACHE JIT

Prints JSON: what was launched, what the library and Triton's compilation listener counted, or the error.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from serving_scenarios import nothing_computed, open_llm, serve

from halimede.engine.build import open_model
from halimede.engine.config import EngineConfig
from halimede.engine.executor.settings import resolve_settings
from halimede.engine.warmup.serving import open_serving_kernels
from halimede.errors import HalimedeError
from halimede.kernels.device_kernels import DeviceKernels
from halimede.kernels.gpu_driver import cuda_driver, hip_driver
from halimede.kernels.launch import Launch
from halimede.kernels.target import find_target


def main(folder: str, target_name: str, library: str, cache: str, jit: str) -> dict[str, Any]:
    compiled = {True: 0, False: 0}  # by whether Triton had it in its own cache

    def count(*, cache_hit: bool, **_: Any) -> None:
        compiled[cache_hit] += 1

    triton.knobs.compilation.listener = count
    target = find_target(target_name)
    config = EngineConfig(model=folder, load_format="dummy", jit=jit, kernel_cache_dir=cache)  # type: ignore[arg-type]
    _, model_config = open_model(config)
    settings = resolve_settings(config, model_config, torch.device("meta"))
    kernels = open_serving_kernels(config, model_config, settings, target)
    driver = (cuda_driver if target.backend == "cuda" else hip_driver)(library)
    device = DeviceKernels(
        kernels.library,
        target,
        driver,
        index=0,
        start=lambda index, start, grid, values: start(grid, 0, values),
        allocate=lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8),
    )
    launches = 0

    def launch(asked: Launch) -> None:
        nonlocal launches
        launches += 1
        if 0 not in asked.grid:
            device.launch(asked.kernel, asked.grid, asked.args, asked.config, asked.constants)

    with kernels.loading_on(device):
        pass
    with nothing_computed(target, launch), open_llm(Path(folder)) as llm:
        serve(llm, batches=(1, 2, 17))
    counters = kernels.library.counters
    return {
        "launches": launches,
        "compiled_by_triton": compiled[False],
        "found_by_triton": compiled[True],
        "jit_compiles_total": counters.jit_compiles_total,
        "kernel_cache_hits_total": counters.kernel_cache_hits_total,
        "jit_compile_seconds_total": counters.jit_compile_seconds_total,
    }


if __name__ == "__main__":
    try:
        print(json.dumps(main(*sys.argv[1:])))
    except HalimedeError as error:
        print(json.dumps({"error": str(error), "kind": type(error).__name__}))
