"""Whole models through the interpreted Triton kernels give the torch path's tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCAB_SIZE, write_variant

from halimede import LLM, SamplingParams

# Two prompts are run in chunks beside rows that decode, one begins with the other's first block.
LENGTHS = (19, 5, 40)
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
SEEDED = SamplingParams(
    temperature=0.9, top_p=0.95, top_k=40, seed=7, max_tokens=5, ignore_eos=True, repetition_penalty=1.2
)


def _prompts() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCAB_SIZE, (max(LENGTHS),), generator=generator).tolist()
    return [{"prompt_token_ids": tokens[:length]} for length in LENGTHS]


def _generate(checkpoint: Path, backend: str, **settings: Any) -> list[list[int]]:
    with LLM(
        str(checkpoint),
        device="cpu",
        dtype="float32",
        attention_backend=backend,
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=24,
        num_gpu_blocks_override=16,
        skip_tokenizer_init=True,
        **settings,
    ) as llm:
        outputs = llm.generate(_prompts(), [GREEDY, SEEDED, GREEDY], use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("variant", ["llama", "qwen3", "gemma3", "mistral-window"])
def test_interpreted_kernels_give_the_torch_paths_tokens(variant: str, tmp_path: Path) -> None:
    checkpoint = write_variant(tmp_path, variant)
    expected = _generate(checkpoint, "torch")
    assert len({tuple(tokens) for tokens in expected}) == len(LENGTHS)
    assert _generate(checkpoint, "triton") == expected


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_narrow_caches_give_nearly_the_same_logprobs(kv_cache_dtype: str, tmp_path: Path) -> None:
    checkpoint = write_variant(tmp_path, "llama")
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)

    def prompt_logprobs(backend: str, dtype: str) -> torch.Tensor:
        with LLM(
            str(checkpoint),
            device="cpu",
            dtype="float32",
            attention_backend=backend,
            kv_cache_dtype=dtype,
            max_model_len=64,
            num_gpu_blocks_override=8,
            skip_tokenizer_init=True,
        ) as llm:
            output = llm.generate(_prompts()[0], params, use_tqdm=False)[0]
        assert output.prompt_logprobs is not None
        return torch.tensor(
            [next(iter(entry.values())).logprob for entry in output.prompt_logprobs if entry is not None]
        )

    exact, narrow = prompt_logprobs("torch", "auto"), prompt_logprobs("triton", kv_cache_dtype)
    error = (narrow - exact).abs().mean().item()
    # Seen: 0.03 and 0.19, where log-probabilities are of size 1 to 10; e4m3 has 3 bits of mantissa.
    assert 0 < error < {"int8": 0.06, "fp8": 0.3}[kv_cache_dtype]
