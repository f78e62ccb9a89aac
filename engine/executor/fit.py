"""Fits runner, graphs and KV cache into a device's memory around a loaded model."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from halimede.engine.config import EngineConfig
from halimede.engine.executor.backend import captures_graphs
from halimede.engine.models.base import CausalLM
from halimede.engine.runner.build_runner import make_device_runner, make_graphs, make_host_runner
from halimede.engine.runner.decode_graphs import CudaRecorder, Recorder, capture_sizes
from halimede.engine.runner.kv_cache import KVCacheSize, KVCacheSpec, allocate_kv_caches, size_kv_cache
from halimede.engine.runner.memory import (
    CudaMemory,
    GpuMemory,
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


@dataclass(frozen=True, slots=True)
class Gpu:
    """What there is on a GPU and not on a CPU. recorder: a new one, None where no graphs are to be."""

    memory: GpuMemory
    recorder: Callable[[], Recorder] | None


def make_runner(
    config: EngineConfig, model: CausalLM, settings: ExecutionSettings
) -> tuple[KVCacheSize, ModelRunner]:
    """A runner with its KV cache, as large as the device's memory and the configuration allow.

    ConfigError for a cache that cannot be had.
    """
    if not settings.uses_triton:
        spec = _spec(config, model, settings)
        size = _size(config, model, spec, cpu_kv_bytes)
        kv_caches = allocate_kv_caches(spec, size.num_blocks, settings.device)
        return size, make_host_runner(model, kv_caches, _limits(config, settings))
    device = settings.device
    if device.type == "cpu":
        return make_triton_runner(config, model, settings, None)
    graphs = captures_graphs(settings.attention) and not config.enforce_eager
    gpu = Gpu(CudaMemory(device), (lambda: CudaRecorder(device)) if graphs else None)
    return make_triton_runner(config, model, settings, gpu)


def make_triton_runner(
    config: EngineConfig, model: CausalLM, settings: ExecutionSettings, gpu: Gpu | None
) -> tuple[KVCacheSize, ModelRunner]:
    """`make_runner` for Triton kernels: on a GPU, or interpreted."""
    # Not above: for a CPU Triton need not be installed.
    from halimede.engine.runner.device_rows import DeviceRows

    device, limits, spec = settings.device, _limits(config, settings), _spec(config, model, settings)
    rows, queue = DeviceRows(limits, device), make_queue(device)
    recorder = None if gpu is None else gpu.recorder
    sizes = [] if recorder is None else capture_sizes(config.max_num_seqs)

    def free_bytes() -> int:
        """Measured with a cache of one block, which is gone when the real one is allocated."""
        if gpu is None:
            return cpu_kv_bytes()
        kv_caches = allocate_kv_caches(spec, 1, device)
        trial = make_device_runner(model, kv_caches, limits, rows, queue)
        step = largest_step(config, spec, settings.max_model_len)
        activations = activation_bytes(trial, step, gpu.memory)
        taken = 0
        if recorder is not None:
            record = make_graphs(model, kv_caches, rows, recorder(), sizes).record
            taken = graph_bytes(record, sizes, gpu.memory)
            del record  # its graphs' memory is free again when it is asked for below
        return gpu_kv_bytes(config, gpu.memory, activations=activations, graphs=taken)

    size = _size(config, model, spec, free_bytes)
    kv_caches = allocate_kv_caches(spec, size.num_blocks, device, model.kv_scales)
    graphs = None
    if recorder is not None:
        graphs = make_graphs(model, kv_caches, rows, recorder(), sizes, lazily=config.lazy_graph_capture)
        graphs.record_all()
    return size, make_device_runner(model, kv_caches, limits, rows, queue, graphs)


def _spec(config: EngineConfig, model: CausalLM, settings: ExecutionSettings) -> KVCacheSpec:
    return KVCacheSpec.from_model(model.config, dtype=settings.kv_cache_dtype, block_size=config.block_size)


def _limits(config: EngineConfig, settings: ExecutionSettings) -> RowLimits:
    return RowLimits(
        max_rows=config.max_num_seqs,
        max_tokens=config.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        block_size=config.block_size,
    )


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
