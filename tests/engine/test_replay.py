"""Same request, same tokens: whatever the chunks, the blocks, the cache, the company or the order."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import greedy_reference, write_variant

from halimede import LLM, SamplingParams

FAMILIES = ["llama", "mistral-window", "qwen2", "qwen3"]
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


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "chunks-of-3": {"max_num_batched_tokens": 3, "max_num_seqs": 3},
    "chunks-of-17": {"max_num_batched_tokens": 17, "max_num_seqs": 5},
    "whole-prompts": {"enable_chunked_prefill": False, "max_num_batched_tokens": 128},
    "blocks-of-32": {"block_size": 32},
    "blocks-of-64": {"block_size": 64, "num_gpu_blocks_override": 20},
    "prefix-hits": {"repeats": 2},
    "no-prefix-cache": {"enable_prefix_caching": False},
    "preemption": {"num_gpu_blocks_override": 8},
    "one-at-a-time": {"max_num_seqs": 1},
    "priority": {"scheduling_policy": "priority", "num_gpu_blocks_override": 9},
}
# What a family adds meets chunks, preemption and the prefix cache; the other options are the scheduler's.
OF_EVERY_FAMILY = ("chunks-of-3", "prefix-hits", "preemption")
CASES = [
    pytest.param(family, options, id=f"{family}-{name}")
    for family in FAMILIES
    for name, options in OPTIONS.items()
    if family in ("llama", "mistral-window") or name in OF_EVERY_FAMILY
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    path = write_variant(tmp_path_factory.mktemp(request.param), request.param)
    return path, [greedy_reference(path, prompt, NEW_TOKENS) for prompt in PROMPTS]


def run(path: Path, prompts: list[list[int]], repeats: int = 1, **options: Any) -> list[list[int]]:
    settings = {"dtype": "float32", "max_model_len": 96, "num_gpu_blocks_override": 80, "block_size": 16}
    with LLM(str(path), skip_tokenizer_init=True, **{**settings, **options}) as llm:
        for _ in range(repeats):
            outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs]


@pytest.mark.parametrize(("family", "options"), CASES, indirect=["family"])
def test_greedy_tokens_never_change(family: tuple[Path, list], options: dict[str, Any]) -> None:
    path, expected = family
    assert run(path, PROMPTS, **options) == expected


def test_nor_with_the_order_of_the_batch(family: tuple[Path, list]) -> None:
    path, expected = family
    order = list(range(len(PROMPTS)))
    random.Random(1).shuffle(order)
    assert run(path, [PROMPTS[i] for i in order]) == [expected[i] for i in order]


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_the_preemption_case_does_preempt(family: tuple[Path, list]) -> None:
    path, _ = family
    options = {"dtype": "float32", "max_model_len": 96, "num_gpu_blocks_override": 8}
    with LLM(str(path), skip_tokenizer_init=True, **options) as llm:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert llm._core._scheduler.num_preemptions > 0


@pytest.mark.parametrize("family", ["llama", "mistral-window"], indirect=True)
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
