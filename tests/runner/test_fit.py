"""How a GPU's memory is shared out, with a GPU that is made up."""

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_overlapped_runner import Recording
from tiny_models import load_model, read_config, write_tiny_checkpoint

from halimede.engine.config import EngineConfig
from halimede.engine.executor.fit import Gpu, make_triton_runner
from halimede.engine.executor.settings import resolve_settings
from halimede.engine.layers.attention_gpu import GpuBackend, TritonAttention
from halimede.engine.models.base import CausalLM
from halimede.engine.runner.decode_graphs import DecodeGraphs, capture_sizes
from halimede.engine.runner.kv_cache import KVCacheSpec
from halimede.engine.runner.memory import graph_bytes
from halimede.errors import ConfigError

CPU = torch.device("cpu")
TOTAL, IN_USE, ACTIVATIONS, GRAPH, POOL = 100_000_000, 20_000_000, 7_000_000, 100_000, 3_000_000


class Memory:
    """Of a GPU on which recorders take POOL for their first graph and GRAPH for each."""

    def __init__(self) -> None:
        self.recorders: list[Recording] = []
        self.runs = 0

    def recorder(self) -> Recording:
        self.recorders.append(Recording())
        return self.recorders[-1]

    def info(self) -> tuple[int, int]:
        gc.collect()
        graphs = sum(POOL * bool(r.recorded) + GRAPH * len(r.recorded) for r in self.recorders)
        return TOTAL - IN_USE - graphs, TOTAL

    def peak(self, run: Callable[[], object]) -> int:
        run()
        self.runs += 1
        return ACTIVATIONS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> CausalLM:
    return load_model(checkpoint, backend=GpuBackend(TritonAttention(32, 3)))


def fit(model: CausalLM, checkpoint: Path, memory: Memory, **changes: Any) -> tuple[int, int]:
    settings: dict[str, Any] = {
        "max_num_seqs": 3,
        "max_num_batched_tokens": 8,
        "max_model_len": 32,
        "gpu_memory_utilization": 0.5,
        "attention_backend": "triton",
        "device": "cpu",
    }
    config = EngineConfig(model=str(checkpoint), **(settings | changes))
    size, _ = make_triton_runner(
        config, model, resolve_settings(config, read_config(checkpoint), CPU), Gpu(memory, memory.recorder)
    )
    return size.num_blocks, size.max_model_len


def test_the_cache_gets_what_nothing_else_needs(
    model: CausalLM, checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: dict[str, int] = {}

    def size(config: Any, model_config: Any, spec: KVCacheSpec, free_bytes: Callable[[], int]) -> Any:
        taken["free"] = free_bytes()
        return original(config, model_config, spec, lambda: 10 * spec.bytes_per_block)

    from halimede.engine.executor import fit as module

    original = module.size_kv_cache
    monkeypatch.setattr(module, "size_kv_cache", size)
    memory = Memory()
    with caplog.at_level(logging.INFO, "halimede"):
        num_blocks, _ = fit(model, checkpoint, memory)
    assert num_blocks == 3 * 2 + 1
    trial, kept = memory.recorders
    assert trial.recorded == [3, 2]
    assert kept.recorded == capture_sizes(3)[::-1] == [3, 2, 1]
    graphs = POOL + 3 * GRAPH
    # The trial's graphs are gone by the time it counts, in a recorder that forgets; here they still count.
    assert taken["free"] == TOTAL // 2 - IN_USE - (POOL + 2 * GRAPH) - ACTIVATIONS - graphs
    assert memory.runs == 1
    assert "for graphs" in caplog.text


def test_a_cache_without_room_is_an_error_that_says_so(model: CausalLM, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="raise gpu_memory_utilization"):
        fit(model, checkpoint, Memory(), gpu_memory_utilization=0.25)


@pytest.mark.parametrize(("fails_at", "expected"), [(None, 500 + 5 * 20), (256, 0), (240, 500)])
def test_what_graphs_will_take_is_told_from_two(fails_at: int | None, expected: int) -> None:
    class Two(Memory):
        free = 10_000

        def info(self) -> tuple[int, int]:
            return self.free, 20_000

    memory = Two()

    def record(size: int) -> bool:
        if size == fails_at:
            return False
        memory.free -= 500 if size == 256 else 20
        return True

    assert graph_bytes(record, [1, 2, 4, 128, 240, 256], memory) == expected


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5, 8, 100, 256, 300, 512])
def test_sizes_of_graphs(most: int) -> None:
    sizes = capture_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    assert sizes[0] == 1
    assert len(sizes) < 40
    for rows in range(9, most + 1):
        padded = next(size for size in sizes if size >= rows)
        assert padded < 1.8 * rows


class Broken:
    """A recorder whose recordings break off, and whose way to end them then raises an error of its own."""

    def __init__(self, cause: type[Exception]) -> None:
        self.cause = cause
        self.released = 0

    def record(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        try:
            raise self.cause("the cause")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def release(self) -> None:
        self.released += 1


def test_only_a_lack_of_memory_is_put_up_with(caplog: pytest.LogCaptureFixture) -> None:
    def graphs_of(recorder: Broken) -> DecodeGraphs:
        return DecodeGraphs(recorder, lambda size: None, lambda size: torch.zeros(size, 1), [1, 2])

    short, wrong = Broken(torch.OutOfMemoryError), Broken(ValueError)
    graphs = graphs_of(short)
    graphs.record_all()
    assert (graphs.sizes, short.released) == ([], 2)
    assert "a previous error during capture" in caplog.text
    with pytest.raises(RuntimeError, match="previous error"):
        graphs_of(wrong).record_all()


def test_lazy_capture_records_nothing_at_the_start(model: CausalLM, checkpoint: Path) -> None:
    memory = Memory()
    fit(model, checkpoint, memory, lazy_graph_capture=True, num_gpu_blocks_override=7)
    assert [r.recorded for r in memory.recorders] == [[]]
