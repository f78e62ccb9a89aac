"""Fits runner, graphs and KV cache into a device's memory around a loaded model."""

import logging
from collections.abc import Callable

import torch

from halimede.engine.config import EngineConfig
from halimede.engine.executor.backend import captures_graphs
from halimede.engine.model_input import KVCache
from halimede.engine.models.base import CausalLM
from halimede.engine.runner.build_runner import make_device_runner, make_graphs, make_host_runner
from halimede.engine.runner.decode_graphs import CudaRecorder, capture_sizes
from halimede.engine.runner.kv_cache import KVCacheSize, KVCacheSpec, allocate_kv_caches, size_kv_cache
from halimede.engine.runner.memory import (
    GpuUse,
    activation_bytes,
    cpu_kv_bytes,
    gpu_kv_bytes,
    graph_bytes,
    largest_step,
)
from halimede.engine.runner.model_runner import ModelRunner
from halimede.engine.runner.rows import RowLimits
from halimede.engine.runner.settings import ExecutionSettings
from halimede.engine.runner.step_queue import make_queue

logger = logging.getLogger(__name__)

_GIB = 1 << 30


def make_runner(
    config: EngineConfig, model: CausalLM, settings: ExecutionSettings
) -> tuple[KVCacheSize, ModelRunner]:
    """A runner with its KV cache, as large as the device's memory and the configuration allow.

    ConfigError for a cache that cannot be had.
    """
    spec = KVCacheSpec.from_model(model.config, dtype=settings.kv_cache_dtype, block_size=config.block_size)
    limits = RowLimits(
        max_rows=config.max_num_seqs,
        max_tokens=config.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        block_size=config.block_size,
    )
    if not settings.uses_triton:
        size = _size(config, model, spec, cpu_kv_bytes)
        return size, make_host_runner(model, _allocate(spec, size, settings), limits)
    return _make_device_runner(config, model, settings, spec, limits)


def _make_device_runner(
    config: EngineConfig,
    model: CausalLM,
    settings: ExecutionSettings,
    spec: KVCacheSpec,
    limits: RowLimits,
) -> tuple[KVCacheSize, ModelRunner]:
    # Not above: for a CPU Triton need not be installed.
    from halimede.engine.runner.device_rows import DeviceRows

    device = settings.device
    rows, queue = DeviceRows(limits, device), make_queue(device)
    sizes: list[int] = []
    if device.type == "cuda" and captures_graphs(settings.attention) and not config.enforce_eager:
        sizes = capture_sizes(config.max_num_seqs)

    def free_bytes() -> int:
        if device.type == "cpu":
            return cpu_kv_bytes()
        return gpu_kv_bytes(config, measure(), device)

    def measure() -> GpuUse:
        """With a cache of one block, which is gone when the real one is allocated."""
        kv_caches = allocate_kv_caches(spec, 1, device)
        runner = make_device_runner(model, kv_caches, limits, rows, queue)
        activations = activation_bytes(runner, largest_step(config, spec, settings.max_model_len), device)
        if not sizes:
            return GpuUse(activations)
        trial = make_graphs(model, kv_caches, rows, CudaRecorder(device), sizes)
        return GpuUse(
            activations, graph_bytes(trial.record, sizes, lambda: torch.cuda.mem_get_info(device)[0])
        )

    size = _size(config, model, spec, free_bytes)
    kv_caches = _allocate(spec, size, settings)
    graphs = None
    if sizes:
        graphs = make_graphs(
            model, kv_caches, rows, CudaRecorder(device), sizes, lazily=config.lazy_graph_capture
        )
        graphs.record_all()
    return size, make_device_runner(model, kv_caches, limits, rows, queue, graphs)


def _size(
    config: EngineConfig, model: CausalLM, spec: KVCacheSpec, free_bytes: Callable[[], int]
) -> KVCacheSize:
    size = size_kv_cache(config, model.config, spec, free_bytes)
    logger.info(
        "KV cache: %d blocks of %d tokens, %.2f GiB; max_model_len %d",
        size.num_blocks,
        spec.block_size,
        size.num_blocks * spec.bytes_per_block / _GIB,
        size.max_model_len,
    )
    return size


def _allocate(spec: KVCacheSpec, size: KVCacheSize, settings: ExecutionSettings) -> tuple[KVCache, ...]:
    return allocate_kv_caches(spec, size.num_blocks, settings.device)
