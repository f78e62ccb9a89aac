"""Runs the model in this process, on one device."""

import contextlib
import gc
import logging
import sys
import time
from typing import TYPE_CHECKING

import torch

from halimede.engine.config import EngineConfig
from halimede.engine.executor.backend import make_backend
from halimede.engine.executor.device import resolve_device
from halimede.engine.executor.fit import make_runner
from halimede.engine.executor.profile import StepProfiler
from halimede.engine.executor.settings import resolve_settings
from halimede.engine.layers.attention_step import Backend
from halimede.engine.loader.dummy import fill_with_random_weights
from halimede.engine.loader.model_files import ModelFiles
from halimede.engine.loader.weights import load_weights, open_weights
from halimede.engine.models.base import CausalLM
from halimede.engine.models.config import ModelConfig
from halimede.engine.models.registry import build_model
from halimede.engine.runner.memory import available_memory
from halimede.engine.runner.model_runner import ModelRunner
from halimede.engine.runner.settings import ExecutionSettings
from halimede.errors import EngineDeadError
from halimede.scheduler.output import ModelRunnerOutput, SchedulerOutput

if TYPE_CHECKING:  # Triton need not be installed
    from halimede.engine.warmup.serving import ServingKernels
    from halimede.kernels.library import KernelCounters

logger = logging.getLogger(__name__)

_GIB = 1 << 30
# Of the memory that is available once the weights are loaded: the KV cache and the system need the rest.
_SECOND_FORM_SHARE = 0.5


class LocalExecutor:
    """Loads the model, sizes and allocates the KV cache, and runs steps.

    Raises ConfigError for a device, dtype, length or cache size that cannot be had, ModelLoadError for
    weights that cannot be loaded.
    """

    def __init__(
        self,
        config: EngineConfig,
        files: ModelFiles,
        model_config: ModelConfig,
        settings: ExecutionSettings | None = None,
        kernels: "ServingKernels | None" = None,
    ) -> None:
        settings = settings or resolve_settings(config, model_config, resolve_device(config.device))
        self.device, self.dtype, self.kv_cache_dtype = (
            settings.device,
            settings.dtype,
            settings.kv_cache_dtype,
        )
        # A CPU has nothing else to do meanwhile.
        self.max_steps_in_flight = 2 if config.async_scheduling and self.device.type == "cuda" else 1
        self._kernels = kernels
        self._profiler = StepProfiler(self.device)
        with self._kernels_in_use():
            backend = make_backend(
                settings.attention,
                self.device,
                max_model_len=settings.max_model_len,
                max_rows=config.max_num_seqs,
            )
            with contextlib.nullcontext() if kernels is None else kernels.loading(self.device):
                model = _load(files, model_config, settings, backend)
            size, runner = make_runner(config, model, settings)
        self.num_blocks = size.num_blocks
        self.max_model_len = size.max_model_len
        self._runner: ModelRunner | None = runner

    @property
    def kernel_counters(self) -> "KernelCounters | None":
        """See Executor.kernel_counters."""
        return None if self._kernels is None else self._kernels.library.counters

    def _kernels_in_use(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._kernels is None else self._kernels.in_use()

    def launch(self, output: SchedulerOutput) -> None:
        """See Executor.launch. EngineDeadError after shutdown."""
        with self._kernels_in_use():
            self._alive().launch(output)

    def collect(self) -> ModelRunnerOutput:
        """See Executor.collect. EngineDeadError after shutdown."""
        with self._kernels_in_use():
            return self._alive().collect()

    def abandon(self) -> None:
        """See Executor.abandon."""
        if self._runner is not None:
            self._runner.abandon()

    def start_profile(self, folder: str) -> None:
        """See Executor.start_profile."""
        self._profiler.start(folder)

    def stop_profile(self) -> str:
        """See Executor.stop_profile."""
        return self._profiler.stop()

    def _alive(self) -> ModelRunner:
        if self._runner is None:
            raise EngineDeadError("the engine has been shut down; make a new one")
        return self._runner

    def shutdown(self) -> None:
        """Free the weights and the KV cache."""
        if self._runner is None:
            return
        self._runner.abandon()
        self._runner = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _load(files: ModelFiles, config: ModelConfig, settings: ExecutionSettings, backend: Backend) -> CausalLM:
    start = time.monotonic()
    model = build_model(config)
    device, dtype = settings.device, settings.dtype
    if files.format == "dummy":
        fill_with_random_weights(model, device=device, dtype=dtype, quantization=config.quantization)
    else:
        with open_weights(files, config.quantization) as source:
            load_weights(
                model,
                source,
                device=device,
                dtype=dtype,
                progress=sys.stderr.isatty(),
                quantization=config.quantization,
            )
    _prepare(model, settings, backend)
    computed = settings.activations
    scheme = config.quantization
    logger.info(
        "loaded %s (%s%s) in %s%s on %s in %.1f s",
        files.reference,
        config.architecture,
        "" if scheme is None else f", quantized: {scheme.method}",
        str(dtype).removeprefix("torch."),
        "" if computed == dtype else f" (computing in {str(computed).removeprefix('torch.')})",
        device,
        time.monotonic() - start,
    )
    return model


def _prepare(model: CausalLM, settings: ExecutionSettings, backend: Backend) -> None:
    """Lay the loaded weights out for the device, within its memory."""
    device, activations = settings.device, settings.activations
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
    model.prepare(device, activations, settings.max_model_len, twice=twice, backend=backend)
