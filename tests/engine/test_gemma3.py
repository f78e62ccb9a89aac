"""The real Gemma 3 (270M, a base model) from its GGUF, against llama.cpp in float32."""

import json
from pathlib import Path

import pytest
from llama_cpp_reference import NEW_TOKENS, REFERENCE, LlamaCpp, make_reference, write_float32_gguf

from halimede import LLM, ConfigError, SamplingParams
from halimede.engine.loader.gguf_tokenizer import load_gguf_tokenizer

GEMMA3 = Path(__file__).parents[2] / ".models" / "gemma-3-270m-Q4_K_M.gguf"
NUM_CHECKED = 8  # of the NEW_TOKENS of each prompt
TEXTS = (
    "Hello  world, é 🙂\n\n\n雪",
    "  leading and trailing  ",
    "tabs\tand\n\n  lines\r\n",
    "1234567 + 89",
    "<start_of_turn>user\nHi<end_of_turn>\n<div>x</div>",
    "▁literal a\u0301 \u00a0",
    "日本語のテキスト 한국어 снег",
    "\x00\x01<unused5>[multimodal]",
)


@pytest.fixture(scope="module")
def gemma3_gguf() -> Path:
    if not GEMMA3.exists():
        pytest.fail(f"{GEMMA3} is missing; run `make model` (or `make test`, which does)")
    return GEMMA3


def test_greedy_tokens_are_those_of_llama_cpp(gemma3_gguf: Path) -> None:
    """And their log-probabilities; the prompts as text, so that the tokenizer is in it too."""
    reference = json.loads(REFERENCE.read_text())
    assert max(len(entry["prompt_token_ids"]) for entry in reference) > 512, "no prompt leaves the window"
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=1)
    with LLM(str(gemma3_gguf), dtype="float32", max_model_len=1024, kv_cache_memory_bytes=1 << 27) as llm:
        outputs = llm.generate([entry["prompt"] for entry in reference], params, use_tqdm=False)
    for entry, output in zip(reference, outputs, strict=True):
        assert output.prompt_token_ids == entry["prompt_token_ids"]
        completion = output.outputs[0]
        assert list(completion.token_ids) == entry["token_ids"]
        assert completion.logprobs is not None
        ours = [at[token].logprob for at, token in zip(completion.logprobs, entry["token_ids"], strict=True)]
        assert ours == pytest.approx(entry["logprobs"], abs=2e-3)


def test_llama_cpp_says_what_the_reference_says(gemma3_gguf: Path, tmp_path: Path) -> None:
    """The first tokens of each, made anew where llama.cpp is installed; and its tokenizer, on texts that are
    not easy."""
    pytest.importorskip("xllamacpp", reason="llama.cpp (the extra [llamacpp]) is not installed")
    llama_cpp = LlamaCpp(write_float32_gguf(gemma3_gguf, tmp_path / "float32.gguf"))
    (tmp_path / "float32.gguf").unlink()  # 1 GB; llama.cpp has it mapped
    tokenizer = load_gguf_tokenizer(gemma3_gguf)
    for text in TEXTS:
        assert tokenizer.encode(text) == llama_cpp.tokenize(text), text
    made = make_reference(llama_cpp, new_tokens=NUM_CHECKED)
    for new, old in zip(made, json.loads(REFERENCE.read_text()), strict=True):
        assert new.pop("logprobs") == pytest.approx(old.pop("logprobs")[:NUM_CHECKED], abs=2e-3)
        assert new == {**old, "token_ids": old["token_ids"][:NUM_CHECKED]}


def test_float16_is_refused(gemma3_gguf: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype='float16'.*Gemma3ForCausalLM.*bfloat16"):
        LLM(str(gemma3_gguf), dtype="float16", skip_tokenizer_init=True)
