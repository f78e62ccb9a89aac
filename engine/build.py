"""Puts an engine together from its configuration; every front end starts here."""

from dataclasses import replace

from halimede.engine.config import EngineConfig
from halimede.engine.core import EngineCore
from halimede.engine.executor.base import Executor
from halimede.engine.executor.device import resolve_device
from halimede.engine.executor.local import LocalExecutor
from halimede.engine.executor.settings import resolve_settings
from halimede.engine.loader.hf_overrides import apply_hf_overrides
from halimede.engine.loader.model_files import ModelFiles
from halimede.engine.loader.resolve import resolve_model
from halimede.engine.models.config import ModelConfig
from halimede.engine.quant.choose import choose_scheme
from halimede.scheduler.config import SchedulerConfig
from halimede.scheduler.scheduler import Scheduler


def open_model(config: EngineConfig) -> tuple[ModelFiles, ModelConfig]:
    """Find (and if need be download) the model and read its configuration; loads no weights yet.

    ConfigError for a `quantization` that the checkpoint contradicts.
    """
    files = resolve_model(
        config.model,
        revision=config.revision,
        token=config.hf_token,
        download_dir=config.download_dir,
        load_format=config.load_format,
    )
    if config.hf_overrides:
        files = replace(
            files,
            config=apply_hf_overrides(files.config, config.hf_overrides),
            config_source=f"{files.config_source} with hf_overrides",
        )
    model_config = ModelConfig.from_hf(files.config, files.config_source)
    scheme = choose_scheme(config.quantization, model_config.quantization, files.config_source)
    return files, replace(model_config, quantization=scheme)


def build_core(
    config: EngineConfig, files: ModelFiles, model_config: ModelConfig
) -> tuple[EngineCore, Executor]:
    """Load the weights in this process and set up the KV cache and the scheduler over it.

    KernelCacheError under jit="forbid" if a kernel that serving may need on the GPU is not in the cache.
    """
    settings = resolve_settings(config, model_config, resolve_device(config.device))
    kernels = None
    if settings.device.type == "cuda":
        # Not above: on a CPU Triton need not be installed.
        from halimede.engine.warmup.serving import open_serving_kernels
        from halimede.kernels.target import target_of_device

        target = target_of_device(settings.device)
        kernels = open_serving_kernels(config, model_config, settings, target)
    executor = LocalExecutor(config, files, model_config, settings, kernels)
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=executor.num_blocks,
            block_size=config.block_size,
            max_model_len=executor.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            enable_prefix_caching=config.enable_prefix_caching,
            enable_chunked_prefill=config.enable_chunked_prefill,
            policy=config.scheduling_policy,
        )
    )
    return EngineCore(scheduler, executor), executor
