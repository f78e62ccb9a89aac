"""Runs the model in this process, on one device."""

import gc
import logging
import sys
import time

import torch

from halimede.engine.config import EngineConfig
from halimede.engine.executor.backend import (
    make_backend,
    resolve_attention_backend,
    resolve_kv_cache_dtype,
)
from halimede.engine.executor.device import (
    resolve_activation_dtype,
    resolve_device,
    resolve_dtype,
)
from halimede.engine.layers.attention_step import Backend
from halimede.engine.loader.dummy import fill_with_random_weights
from halimede.engine.loader.model_files import ModelFiles
from halimede.engine.loader.weights import load_weights, open_weights
from halimede.engine.models.base import CausalLM
from halimede.engine.models.config import ModelConfig
from halimede.engine.models.registry import build_model
from halimede.engine.runner.kv_cache import (
    KVCacheSpec,
    allocate_kv_caches,
    check_max_model_len,
    size_kv_cache,
)
from halimede.engine.runner.memory import available_memory, cpu_kv_bytes, gpu_kv_bytes
from halimede.engine.runner.model_runner import ModelRunner
from halimede.engine.runner.sampler import make_sampler
from halimede.errors import EngineDeadError
from halimede.scheduler.output import ModelRunnerOutput, SchedulerOutput

logger = logging.getLogger(__name__)

_GIB = 1 << 30
# Of the memory that is available once the weights are loaded: the KV cache and the system need the rest.
_SECOND_FORM_SHARE = 0.5


class LocalExecutor:
    """Loads the model, sizes and allocates the KV cache, and runs steps.

    Raises ConfigError for a device, dtype, length or cache size that cannot be had, ModelLoadError for
    weights that cannot be loaded.
    """

    def __init__(self, config: EngineConfig, files: ModelFiles, model_config: ModelConfig) -> None:
        self.device = resolve_device(config.device)
        overflows = None if model_config.supports_float16 else model_config.architecture
        self.dtype = resolve_dtype(config.dtype, model_config.dtype, self.device, no_float16_for=overflows)
        longest = check_max_model_len(config, model_config)
        attention = resolve_attention_backend(config.attention_backend, self.device)
        activations = resolve_activation_dtype(self.dtype, self.device)
        # Triton reads what it computes in (on a GPU the two are one), a CPU's torch path widens.
        plain = activations if attention == "triton" else self.dtype
        self.kv_cache_dtype = resolve_kv_cache_dtype(config.kv_cache_dtype, plain, attention)
        backend = make_backend(attention, self.device, longest)
        model = _load(files, model_config, self.device, self.dtype, longest, backend)
        spec = KVCacheSpec.from_model(model_config, dtype=self.kv_cache_dtype, block_size=config.block_size)

        def free_bytes() -> int:
            if self.device.type == "cpu":
                return cpu_kv_bytes()
            return gpu_kv_bytes(model, spec, config, longest, self.device)

        size = size_kv_cache(config, model_config, spec, free_bytes)
        self.num_blocks = size.num_blocks
        self.max_model_len = size.max_model_len
        kv_caches = allocate_kv_caches(spec, size.num_blocks, self.device)
        logger.info(
            "KV cache: %d blocks of %d tokens, %.2f GiB; max_model_len %d",
            size.num_blocks,
            spec.block_size,
            size.num_blocks * spec.bytes_per_block / _GIB,
            size.max_model_len,
        )
        uses_triton = self.device.type != "cpu" or attention == "triton"
        self._runner: ModelRunner | None = ModelRunner(
            model,
            kv_caches,
            block_size=spec.block_size,
            device=self.device,
            sampler=make_sampler(self.device, triton=uses_triton),
        )

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step. EngineDeadError after shutdown."""
        if self._runner is None:
            raise EngineDeadError("the engine has been shut down; make a new one")
        return self._runner.execute(output)

    def shutdown(self) -> None:
        """Free the weights and the KV cache."""
        if self._runner is None:
            return
        self._runner = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _load(
    files: ModelFiles,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int,
    backend: Backend,
) -> CausalLM:
    start = time.monotonic()
    model = build_model(config)
    if files.format == "dummy":
        fill_with_random_weights(model, device=device, dtype=dtype)
    else:
        with open_weights(files) as source:
            load_weights(model, source, device=device, dtype=dtype, progress=sys.stderr.isatty())
    computed = _prepare(model, device, dtype, max_model_len, backend)
    logger.info(
        "loaded %s (%s) in %s%s on %s in %.1f s",
        files.reference,
        config.architecture,
        str(dtype).removeprefix("torch."),
        "" if computed == dtype else f" (computing in {str(computed).removeprefix('torch.')})",
        device,
        time.monotonic() - start,
    )
    return model


def _prepare(
    model: CausalLM, device: torch.device, dtype: torch.dtype, max_model_len: int, backend: Backend
) -> torch.dtype:
    """Lay the loaded weights out for the device, within its memory. Returns the type of activations."""
    activations = resolve_activation_dtype(dtype, device)
    twice = True
    if device.type == "cpu":
        needed, available = model.second_form_bytes(activations), available_memory()
        twice = needed <= _SECOND_FORM_SHARE * available
        if not twice:
            logger.warning(
                "weights are kept in one form, which is slower: a second one needs %.1f GiB, more than "
                "half of the %.1f GiB of memory that are available",
                needed / _GIB,
                available / _GIB,
            )
    model.prepare(device, activations, max_model_len, twice=twice, backend=backend)
    return activations
