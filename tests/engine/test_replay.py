"""Same request, same tokens: whatever the chunks, the blocks, the cache, the company or the order."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import greedy_reference, write_tiny_checkpoint

from halimede import LLM, SamplingParams

FAMILIES = ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
NEW_TOKENS = 16
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
Runner = Callable[..., list[list[int]]]


def make_prompts() -> list[list[int]]:
    """Ragged lengths, two pairs with a long common prefix, one prompt twice."""
    rng = random.Random(3)
    shared = [rng.randrange(5, 400) for _ in range(50)]
    prompts = [[rng.randrange(5, 400) for _ in range(n)] for n in (1, 2, 15, 16, 17, 33, 70)]
    return [*prompts, [*shared, 7, 8], [*shared, 9], prompts[5]]


PROMPTS = make_prompts()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    architecture = request.param
    path = write_tiny_checkpoint(tmp_path_factory.mktemp(architecture), architecture, seed=11)
    return path, [greedy_reference(path, prompt, NEW_TOKENS) for prompt in PROMPTS]


def run(path: Path, prompts: list[list[int]], repeats: int = 1, **options: Any) -> list[list[int]]:
    settings = {"dtype": "float32", "max_model_len": 96, "num_gpu_blocks_override": 80, "block_size": 16}
    with LLM(str(path), skip_tokenizer_init=True, **{**settings, **options}) as llm:
        for _ in range(repeats):
            outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"max_num_batched_tokens": 3, "max_num_seqs": 3}, id="chunks-of-3"),
        pytest.param({"max_num_batched_tokens": 17, "max_num_seqs": 5}, id="chunks-of-17"),
        pytest.param({"enable_chunked_prefill": False, "max_num_batched_tokens": 128}, id="whole-prompts"),
        pytest.param({"block_size": 32}, id="blocks-of-32"),
        pytest.param({"block_size": 64, "num_gpu_blocks_override": 20}, id="blocks-of-64"),
        pytest.param({"repeats": 2}, id="prefix-hits"),
        pytest.param({"enable_prefix_caching": False}, id="no-prefix-cache"),
        pytest.param({"num_gpu_blocks_override": 8}, id="preemption"),
        pytest.param({"max_num_seqs": 1}, id="one-at-a-time"),
        pytest.param({"scheduling_policy": "priority", "num_gpu_blocks_override": 9}, id="priority"),
    ],
)
def test_greedy_tokens_never_change(family: tuple[Path, list], options: dict[str, Any]) -> None:
    path, expected = family
    assert run(path, PROMPTS, **options) == expected


def test_nor_with_the_order_of_the_batch(family: tuple[Path, list]) -> None:
    path, expected = family
    order = list(range(len(PROMPTS)))
    random.Random(1).shuffle(order)
    assert run(path, [PROMPTS[i] for i in order]) == [expected[i] for i in order]


def test_the_preemption_case_does_preempt(family: tuple[Path, list]) -> None:
    path, _ = family
    options = {"dtype": "float32", "max_model_len": 96, "num_gpu_blocks_override": 8}
    with LLM(str(path), skip_tokenizer_init=True, **options) as llm:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert llm._core._scheduler.num_preemptions > 0


def test_seeded_sampling_does_not_change_either(family: tuple[Path, list]) -> None:
    path, _ = family
    params = [
        SamplingParams(temperature=1.0, top_p=0.9, top_k=50, seed=i, max_tokens=NEW_TOKENS, ignore_eos=True)
        for i in range(len(PROMPTS))
    ]
    results = []
    for options in ({}, {"max_num_batched_tokens": 7, "max_num_seqs": 3}, {"num_gpu_blocks_override": 8}):
        settings = {"dtype": "float32", "max_model_len": 96, "num_gpu_blocks_override": 80, **options}
        with LLM(str(path), skip_tokenizer_init=True, **settings) as llm:
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
            results.append([list(o.outputs[0].token_ids) for o in outputs])
    assert results[0] == results[1] == results[2]
