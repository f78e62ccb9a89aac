"""Loading, sizing, running and shutting down in this process."""

import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from sampling_reference import new_sequence
from tiny_models import read_config, reference_logits, write_tiny_checkpoint

from halimede.engine.config import EngineConfig
from halimede.engine.executor import device, local
from halimede.engine.executor.base import Executor
from halimede.engine.executor.device import cpu_has_bfloat16
from halimede.engine.executor.local import LocalExecutor
from halimede.engine.layers.linear import Linear
from halimede.engine.loader.resolve import resolve_model
from halimede.engine.models.base import CausalLM
from halimede.engine.runner.build_runner import make_host_runner
from halimede.engine.runner.kv_cache import KVCacheSpec, allocate_kv_caches
from halimede.engine.runner.memory import largest_step
from halimede.engine.runner.rows import RowLimits
from halimede.errors import ConfigError, EngineDeadError
from halimede.scheduler.output import ModelRunnerOutput, ScheduledSequence, SchedulerOutput
from halimede.scheduler.sampling_params import SamplingParams

PROMPT = (5, 6, 7, 8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), dtype=torch.bfloat16)


def make(checkpoint: Path, **settings: Any) -> LocalExecutor:
    config = EngineConfig(model=str(checkpoint), **({"device": "cpu"} | settings))
    return LocalExecutor(config, resolve_model(str(checkpoint)), read_config(checkpoint))


def execute(executor: LocalExecutor, output: SchedulerOutput) -> ModelRunnerOutput:
    executor.launch(output)
    return executor.collect()


def prefill() -> SchedulerOutput:
    new = new_sequence(SamplingParams(temperature=0), prompt=PROMPT)
    return SchedulerOutput(0, (ScheduledSequence(0, len(PROMPT), 0, (1,), True, new),))


def test_runs_and_shuts_down(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "halimede"):
        executor = make(checkpoint, dtype="float32", num_gpu_blocks_override=6)
    seam: Executor = executor
    assert seam.max_steps_in_flight == 1
    assert (seam.num_blocks, seam.max_model_len) == (6, 80)
    assert "LlamaForCausalLM" in caplog.text
    assert "6 blocks of 16 tokens" in caplog.text
    expected = int(reference_logits(checkpoint, PROMPT)[-1].argmax())
    assert execute(executor, prefill()).sampled_token_ids == {0: (expected,)}
    assert executor._runner is not None
    weight = weakref.ref(executor._runner._model)
    cache = weakref.ref(executor._runner._kv_caches[0][0])
    seam.shutdown()
    seam.shutdown()
    gc.collect()
    assert weight() is cache() is None
    with pytest.raises(EngineDeadError, match="shut down"):
        execute(executor, prefill())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(checkpoint: Path, dtype: str) -> None:
    executor = make(checkpoint, dtype=dtype, max_model_len=32)
    assert executor.dtype == getattr(torch, dtype)
    assert executor._runner is not None
    assert executor._runner._kv_caches[0][0].dtype == executor.dtype
    assert len(execute(executor, prefill()).sampled_token_ids) == 1


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_kept_once_where_memory_is_short(
    checkpoint: Path,
    dtype: str,
    native: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(device, "cpu_has_bfloat16", lambda: native)
    outputs = []
    for available in (1 << 40, 1 << 10):
        monkeypatch.setattr(local, "available_memory", lambda available=available: available)
        caplog.clear()
        executor = make(checkpoint, dtype=dtype, max_model_len=32)
        assert executor._runner is not None
        linears = [m for m in executor._runner._model.modules() if isinstance(m, Linear)]
        forms = {(bool(m.weight.numel()) or m.table is not None, m.packed is not None) for m in linears}
        short = available < 1 << 20
        assert ("kept in one form" in caplog.text) is short
        assert len(forms) == 1
        assert sum(forms.pop()) == (1 if short else 2) or (native and not cpu_has_bfloat16())
        outputs.append(execute(executor, prefill()).sampled_token_ids)
    assert outputs[0] == outputs[1]


def test_the_default_size_is_what_the_sequences_can_use(checkpoint: Path) -> None:
    executor = make(checkpoint, max_num_seqs=3)
    assert (executor.num_blocks, executor.max_model_len) == (3 * 16 + 1, 256)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"device": "cuda:99"}, "device='cuda:99'"),
        ({"device": "gpu"}, "device='gpu'"),
        ({"max_model_len": 257}, "max_position_embeddings=256"),
        ({"kv_cache_memory_bytes": 100}, "no room for a single block"),
        ({"max_model_len": 100, "num_gpu_blocks_override": 3}, "at most 32"),
    ],
)
def test_what_cannot_be_had(checkpoint: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(checkpoint, **settings)


def test_the_largest_step_runs_in_one_block(checkpoint: Path) -> None:
    """What a GPU runs to measure its memory, run here."""
    executor = make(checkpoint, num_gpu_blocks_override=2)
    assert executor._runner is not None
    model: CausalLM = executor._runner._model
    config = EngineConfig(model="m", max_num_seqs=5, max_num_batched_tokens=600)
    spec = KVCacheSpec.from_model(model.config, dtype=executor.dtype, block_size=16)
    caches = allocate_kv_caches(spec, 1, torch.device("cpu"))
    runner = make_host_runner(model, caches, RowLimits(5, 600, 256, 16))
    result = runner.execute(largest_step(config, spec, 256))
    assert sorted(result.sampled_token_ids) == list(range(5))
    assert len(result.prompt_logprobs[0]) == 255
    assert result.errors == {}
