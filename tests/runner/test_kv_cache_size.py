"""How many blocks there are and how long a sequence may be."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_tiny_checkpoint

from halimede.engine.config import EngineConfig
from halimede.engine.models.config import ModelConfig
from halimede.engine.runner.kv_cache import (
    KVCacheSpec,
    allocate_kv_caches,
    check_max_model_len,
    size_kv_cache,
)
from halimede.engine.runner.memory import available_memory, cpu_kv_bytes, largest_step
from halimede.errors import ConfigError

LIMIT = 100
BLOCK = 2 * 2 * 2 * 16 * 16 * 2  # K and V, layers, kv heads, block size, head dim, bytes of bfloat16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), max_position_embeddings=LIMIT)
    return ModelConfig.from_hf(json.loads((path / "config.json").read_text()), "config.json")


def config_of(**settings: Any) -> EngineConfig:
    return EngineConfig(**({"model": "m", "max_num_seqs": 3} | settings))


def spec_of(model: ModelConfig) -> KVCacheSpec:
    return KVCacheSpec.from_model(model, dtype=torch.bfloat16, block_size=16)


def size(model: ModelConfig, free: int | None = None, **settings: Any) -> tuple[int, int]:
    def free_bytes() -> int:
        assert free is not None, "the device is asked although the configuration says"
        return free

    found = size_kv_cache(config_of(**settings), model, spec_of(model), free_bytes)
    return found.num_blocks, found.max_model_len


def test_bytes_per_block(model: ModelConfig) -> None:
    spec = spec_of(model)
    assert spec.bytes_per_block == BLOCK
    caches = allocate_kv_caches(spec, 5, torch.device("cpu"))
    assert sum(t.nbytes for cache in caches for t in cache.tensors) == 5 * BLOCK
    assert caches[0][0].shape == (5, 2, 16, 16)
    assert not any(t.any() for cache in caches for t in cache.tensors)


def test_sliding_window_only_where_all_layers_have_it(model: ModelConfig) -> None:
    for windows, expected in (((8, 8), 8), ((None, 8), None), ((None, None), None)):
        assert spec_of(dataclasses.replace(model, sliding_windows=windows)).sliding_window == expected


@pytest.mark.parametrize(
    ("settings", "free", "expected"),
    [
        ({"num_gpu_blocks_override": 9}, None, (9, LIMIT)),
        ({"num_gpu_blocks_override": 1000}, None, (1000, LIMIT)),
        ({"num_gpu_blocks_override": 9, "kv_cache_memory_bytes": 1}, None, (9, LIMIT)),
        ({"kv_cache_memory_bytes": 10 * BLOCK + BLOCK - 1}, None, (10, LIMIT)),
        ({"kv_cache_memory_bytes": 4 * BLOCK}, None, (4, 48)),
        ({}, 10 * BLOCK, (10, LIMIT)),
        ({}, 1 << 40, (3 * 7 + 1, LIMIT)),
        ({"max_model_len": 32}, 1 << 40, (3 * 2 + 1, 32)),
        ({"max_model_len": 33}, 4 * BLOCK, (4, 33)),
        ({"max_model_len": LIMIT}, 8 * BLOCK, (8, LIMIT)),
        ({}, 2 * BLOCK, (2, 16)),
    ],
)
def test_size(model: ModelConfig, settings: dict[str, Any], free: int, expected: tuple[int, int]) -> None:
    assert size(model, free, **settings) == expected


def test_a_reduced_length_is_logged(model: ModelConfig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "halimede"):
        assert size(model, 8 * BLOCK) == (8, LIMIT)
        assert not caplog.records
        assert size(model, 7 * BLOCK) == (7, 96)
    assert "max_model_len is 96, not the model's 100" in caplog.text


@pytest.mark.parametrize(
    ("settings", "free", "words"),
    [
        ({"max_model_len": 101}, 1 << 40, ["max_model_len=101", "max_position_embeddings=100", "untrained"]),
        (
            {"max_model_len": 97},
            7 * BLOCK,
            ["max_model_len=97", "needs 8 blocks", "has 7 blocks", "gpu_memory_utilization", "at most 96"],
        ),
        (
            {"max_model_len": 50, "kv_cache_memory_bytes": 4 * BLOCK},
            None,
            ["raise kv_cache_memory_bytes", "at most 48", str(5 * BLOCK)],
        ),
        ({"max_model_len": 50, "num_gpu_blocks_override": 4}, None, ["raise num_gpu_blocks_override"]),
        ({}, 2 * BLOCK - 1, ["no room for a single block", "gpu_memory_utilization"]),
        ({}, 0, ["no room for a single block"]),
        ({"kv_cache_memory_bytes": 1}, None, ["no room", "raise kv_cache_memory_bytes"]),
        ({"num_gpu_blocks_override": 1}, None, ["no room", "raise num_gpu_blocks_override"]),
    ],
)
def test_too_small(model: ModelConfig, settings: dict[str, Any], free: int, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        size(model, free, **settings)
    for word in words:
        assert word in str(error.value)


def test_max_model_len_is_checked_before_anything_is_loaded(model: ModelConfig) -> None:
    assert check_max_model_len(config_of(), model) == LIMIT
    assert check_max_model_len(config_of(max_model_len=7), model) == 7
    with pytest.raises(ConfigError, match="max_model_len=101"):
        check_max_model_len(config_of(max_model_len=101), model)


def test_a_cache_that_cannot_be_allocated(model: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="cannot allocate a KV cache"):
        allocate_kv_caches(spec_of(model), 1 << 50, torch.device("cpu"))


def test_cpu_default(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9000000 kB\nMemAvailable:    1000 kB\n")
    assert available_memory(meminfo) == 1000 * 1024
    assert cpu_kv_bytes(meminfo) == 400 * 1024
    meminfo.write_text("MemAvailable:   90000000 kB\n")
    assert cpu_kv_bytes(meminfo) == 4 << 30
    for text in ("", "MemAvailable: many kB\n", "MemAvailable:\n"):
        meminfo.write_text(text)
        assert available_memory(meminfo) > 0
    assert available_memory(tmp_path / "none") > 0


@pytest.mark.parametrize(
    ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "lengths"),
    [(3, 10, 100, [8, 1, 1]), (3, 10, 4, [4, 4, 2]), (3, 100, 4, [4, 4, 4]), (2, 2, 100, [1, 1])],
)
def test_largest_step(
    model: ModelConfig,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    lengths: list[int],
) -> None:
    config = config_of(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    step = largest_step(config, spec_of(model), max_model_len)
    assert [s.num_tokens for s in step.scheduled] == lengths
