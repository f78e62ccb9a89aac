"""Recorded layers give what the layers give, at every number of rows, and decoding goes on without them."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_tiny_checkpoint

from halimede import LLM, SamplingParams
from halimede.engine.models import layer_trace
from halimede.engine.models.layer_trace import LayerTraces

PROMPTS = [[3 + i % 7] * (1 + 5 * i % 23) + list(range(10, 14 + i % 5)) for i in range(20)]


def _generate(path: Path, counts: tuple[int, ...], dtype: Any) -> list[list[int]]:
    """Greedy tokens of the first n prompts together, for each n."""
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(str(path), skip_tokenizer_init=True, dtype=dtype, max_model_len=128) as llm:
        return [
            list(output.outputs[0].token_ids)
            for count in counts
            for output in llm.generate(
                [{"prompt_token_ids": prompt} for prompt in PROMPTS[:count]], params, use_tqdm=False
            )
        ]


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recorded_layers_give_the_same_tokens(
    architecture: str,
    dtype: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = write_tiny_checkpoint(tmp_path, architecture)
    forms: set[str] = set()
    original = LayerTraces.run

    def watched(self: LayerTraces, *arguments: Any) -> torch.Tensor:
        output = original(self, *arguments)
        forms.update(form.size for form, replay in self._traces.items() if replay is not None)
        return output

    monkeypatch.setattr(LayerTraces, "run", watched)
    recorded = _generate(path, (1, 3, 20), dtype)
    assert forms == {"one", "few", "many"}

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no tracing in this torch")

    monkeypatch.setattr(layer_trace.torch.jit, "trace", refuse)
    with caplog.at_level(logging.WARNING):
        assert _generate(path, (1, 3, 20), dtype) == recorded
    assert "no tracing in this torch" in caplog.text
