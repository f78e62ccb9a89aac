"""The real model, SmolLM2-135M-Instruct from its GGUF, against transformers in float32."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import pytest
import torch

from halimede import LLM, RequestOutputKind, SamplingParams
from halimede.engine.tokenizer import IncrementalDetokenizer

Oracle = Callable[[list[int]], torch.Tensor]
NEW_TOKENS = 32
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "List the first 10 prime numbers: 2, 3, 5,",
    "Explain gravity to a child.",
    "Translate 'good morning' into Spanish and German.",
    "def fibonacci(n):",
    "Why is the sky blue? Answer in two sentences.",
    "Name 3 moons of Neptune, discovered in 1846, 1949 and 2002.",
]


@pytest.fixture(scope="module")
def llm(smollm2_gguf: Path) -> Iterator[LLM]:
    with LLM(str(smollm2_gguf), dtype="float32", max_model_len=512, kv_cache_memory_bytes=1 << 28) as llm:
        yield llm


@pytest.fixture(scope="module")
def prompts(llm: LLM) -> list[list[int]]:
    texts = [llm.render_chat([{"role": "user", "content": q}]) for q in QUESTIONS]
    return [llm.get_tokenizer().encode(text, add_special_tokens=False) for text in texts]


@pytest.fixture(scope="module")
def oracle(smollm2_gguf: Path) -> Oracle:
    """Token ids to the logits (T, V) of transformers, which reads the GGUF in its own way."""
    from transformers import AutoModelForCausalLM

    with pytest.MonkeyPatch.context() as patch:
        # It parses the file twice and makes the same map of names for each tensor anew: 10 s.
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        model = AutoModelForCausalLM.from_pretrained(
            smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
        )

    def logits(token_ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([token_ids])).logits[0]

    return logits


def test_greedy_tokens_are_those_of_transformers(llm: LLM, prompts: list, oracle: Oracle) -> None:
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], GREEDY, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        ours = list(output.outputs[0].token_ids)
        assert len(ours) == NEW_TOKENS
        # Each of transformers' choices after our tokens so far: equal everywhere means equal from the start.
        theirs = oracle(prompt + ours)[len(prompt) - 1 : -1].argmax(dim=-1).tolist()
        assert ours == theirs


def test_log_probabilities_are_those_of_transformers(llm: LLM, prompts: list, oracle: Oracle) -> None:
    params = GREEDY.replace(max_tokens=1, logprobs=20)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = torch.log_softmax(oracle(prompt)[-1], dim=-1)
        assert output.outputs[0].logprobs is not None
        ours = output.outputs[0].logprobs[0]
        assert set(ours) == set(expected.topk(20).indices.tolist())
        for token, logprob in ours.items():
            assert logprob.logprob == pytest.approx(expected[token].item(), abs=2e-4)


def test_the_answer_makes_sense(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=32)
    output = llm.chat([{"role": "user", "content": QUESTIONS[0]}], params)
    completion = output[0].outputs[0]
    assert "Paris" in completion.text
    assert completion.finish_reason == "stop"
    assert "<|im_end|>" not in completion.text


@pytest.mark.parametrize(
    "text",
    [
        "plain words, 1234 and more",
        "émigré naïveté",
        "日本語のテキスト",
        "😀👨‍👩‍👧 family",
        "tabs\tand\n\nlines   ",
        "a\u0301 e\u0300",
    ],
)
def test_streamed_text_equals_text_decoded_at_once(llm: LLM, text: str) -> None:
    tokenizer = llm.get_tokenizer()
    prompt, ids = tokenizer.encode("Say:"), tokenizer.encode(text)
    stream = IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=True)
    pieces = [stream.add(i) for i in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.flush() == text


def test_unfinished_and_hopeless_bytes_do_not_stall_a_stream(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    ids = tokenizer.encode("日")
    half = IncrementalDetokenizer(tokenizer, [], skip_special_tokens=True)
    assert [half.add(i) for i in ids[:-1]] == [""] * (len(ids) - 1)
    assert "\ufffd" in half.flush()
    lead = next(i for i in ids if tokenizer.decode([i]) == "\ufffd")
    stream = IncrementalDetokenizer(tokenizer, [], skip_special_tokens=True)
    assert "".join(stream.add(lead) for _ in range(300)).count("\ufffd") > 200
    special = IncrementalDetokenizer(tokenizer, [], skip_special_tokens=True)
    assert "".join(special.add(tokenizer.eos_token_id) for _ in range(50)) == ""
    assert len(special._pending) < 50
    assert "".join(special.add(i) for i in tokenizer.encode("雪 is snow")) == "雪 is snow"
    literal = "\ufffd" * 9 + "雪" + "\ufffd"
    stream = IncrementalDetokenizer(tokenizer, [], skip_special_tokens=True)
    assert "".join(stream.add(i) for i in tokenizer.encode(literal)) + stream.flush() == literal


def test_stop_strings_cut_the_stream(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=32, stop=[" is"], output_kind=RequestOutputKind.DELTA)
    prompt = llm.render_chat([{"role": "user", "content": QUESTIONS[0]}])
    outputs = list(llm.stream(prompt, params, add_special_tokens=False))
    text = "".join(c.text for o in outputs for c in o.outputs)
    assert text
    assert " is" not in text
    assert (outputs[-1].outputs[0].finish_reason, outputs[-1].outputs[0].stop_reason) == ("stop", " is")
