"""The KV cache: how large one block is, how many there are, how long a sequence may be, the memory itself."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from halimede.engine.config import EngineConfig
from halimede.engine.model_input import KVCache
from halimede.engine.models.config import ModelConfig
from halimede.errors import ConfigError

logger = logging.getLogger(__name__)

_GIB = 1 << 30
_SCALE = torch.float32
_ALIGNMENT = 64  # bytes: a cache line, and what torch gives its own tensors


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """What one block of the cache holds: keys and values of block_size tokens in every layer.

    Eight-bit types have scales: float8 one for the whole cache, int8 one per token and head.
    sliding_window: tokens that a token sees, None for all of them or when layers differ.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    block_size: int
    sliding_window: int | None = None

    @classmethod
    def from_model(cls, model: ModelConfig, *, dtype: torch.dtype, block_size: int) -> "KVCacheSpec":
        """The spec of a model's cache."""
        windows = set(model.sliding_windows)
        return cls(
            num_layers=model.num_hidden_layers,
            num_kv_heads=model.num_key_value_heads,
            head_dim=model.head_dim,
            dtype=dtype,
            block_size=block_size,
            sliding_window=windows.pop() if len(windows) == 1 else None,
        )

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block, keys and values of all layers."""
        per_token = self.head_dim * self.dtype.itemsize + (_SCALE.itemsize if self.scale_per_token else 0)
        return 2 * self.num_layers * self.num_kv_heads * self.block_size * per_token

    @property
    def scale_per_token(self) -> bool:
        """Whether each token and head has a scale."""
        return self.dtype == torch.int8

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that num_tokens tokens of one sequence fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)


@dataclass(frozen=True, slots=True)
class KVCacheSize:
    """num_blocks: blocks in all, with the null block. max_model_len: tokens of the longest sequence."""

    num_blocks: int
    max_model_len: int


def check_max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """The configured max_model_len, or the model's; ConfigError if the model was not trained for it."""
    limit = model.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len={config.max_model_len} is above the model's max_position_embeddings={limit}: "
            f"positions beyond that are untrained; set max_model_len to at most {limit}"
        )
    return limit if config.max_model_len is None else config.max_model_len


def size_kv_cache(
    config: EngineConfig, model: ModelConfig, spec: KVCacheSpec, free_bytes: Callable[[], int]
) -> KVCacheSize:
    """Decide the number of blocks and, where it is left open, max_model_len.

    free_bytes: what the device can give the cache; called only when the configuration does not say.
    Never more blocks than max_num_seqs sequences of max_model_len can use, but with num_gpu_blocks_override.
    Raises ConfigError when there is no room for a block or for one sequence of the configured max_model_len.
    """
    wanted = check_max_model_len(config, model)
    if config.num_gpu_blocks_override is not None:
        num_blocks = config.num_gpu_blocks_override
        source = f"num_gpu_blocks_override={num_blocks}"
    else:
        explicit = config.kv_cache_memory_bytes
        available = free_bytes() if explicit is None else explicit
        usable = config.max_num_seqs * spec.blocks_for(wanted) + 1
        num_blocks = max(0, min(available // spec.bytes_per_block, usable))
        source = f"{available} bytes ({available / _GIB:.2f} GiB)"
    capacity = (num_blocks - 1) * spec.block_size
    if capacity < 1:
        raise ConfigError(
            f"the KV cache has no room for a single block: {source}, but it needs 2 blocks (one is never "
            f"used) of {spec.bytes_per_block} bytes each; {_more_memory(config)}"
        )
    if config.max_model_len is not None and capacity < wanted:
        needed = (spec.blocks_for(wanted) + 1) * spec.bytes_per_block
        raise ConfigError(
            f"the KV cache is too small for one sequence of max_model_len={wanted}: it needs "
            f"{spec.blocks_for(wanted) + 1} blocks, {needed} bytes ({needed / _GIB:.2f} GiB), and has "
            f"{num_blocks} blocks from {source}; {_more_memory(config)}, "
            f"or set max_model_len to at most {capacity}"
        )
    if capacity < wanted:
        logger.warning(
            "max_model_len is %d, not the model's %d: the KV cache (%s) holds no more; to change that, %s",
            capacity,
            wanted,
            source,
            _more_memory(config),
        )
    return KVCacheSize(num_blocks, min(wanted, capacity))


def _more_memory(config: EngineConfig) -> str:
    """The remedy for a cache that is too small, by where its size came from."""
    if config.num_gpu_blocks_override is not None:
        return "raise num_gpu_blocks_override"
    if config.kv_cache_memory_bytes is not None:
        return "raise kv_cache_memory_bytes"
    return "raise gpu_memory_utilization (on a GPU) or set kv_cache_memory_bytes, or free memory"


def allocate_kv_caches(
    spec: KVCacheSpec,
    num_blocks: int,
    device: torch.device,
    scales: Sequence[tuple[float, float]] | None = None,
) -> tuple[KVCache, ...]:
    """Zeroed keys and values of each layer, [N, K, B, D], and their scales; ConfigError if the memory is not
    there.

    Zeroed because what a masked score multiplies must not be NaN. scales: those of keys and values of each
    layer where the whole cache has one; None is 1.
    """
    shape = (num_blocks, spec.num_kv_heads, spec.block_size, spec.head_dim)
    zeros = _cpu_zeros if device.type == "cpu" else torch.zeros

    def scale(value: float) -> torch.Tensor | None:
        if spec.scale_per_token:
            return zeros(shape[:3], dtype=_SCALE, device=device)
        return torch.full((1,), value, dtype=_SCALE, device=device) if spec.dtype.itemsize == 1 else None

    try:
        return tuple(
            KVCache(
                zeros(shape, dtype=spec.dtype, device=device),
                zeros(shape, dtype=spec.dtype, device=device),
                scale(k_scale),
                scale(v_scale),
            )
            for k_scale, v_scale in scales or [(1.0, 1.0)] * spec.num_layers
        )
    except (MemoryError, torch.OutOfMemoryError) as error:
        size = num_blocks * spec.bytes_per_block
        raise ConfigError(
            f"cannot allocate a KV cache of {num_blocks} blocks, {size} bytes ({size / _GIB:.2f} GiB), "
            f"on {device}: {error}; lower kv_cache_memory_bytes, num_gpu_blocks_override or "
            "gpu_memory_utilization, or free memory"
        ) from error


def _cpu_zeros(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros whose pages take memory and time only when they are first used, unlike torch.zeros."""
    size = math.prod(shape) * dtype.itemsize
    memory = torch.from_numpy(np.zeros(size + _ALIGNMENT, dtype=np.uint8)).to(device)
    start = -memory.data_ptr() % _ALIGNMENT
    return memory[start : start + size].view(dtype).view(shape)
