"""Tokenizers out of GGUF metadata against the originals, built as the published files describe them.

`smollm2_tokens.json` holds what llama.cpp makes of some texts with the real SmolLM2 file, as [text, ids]
pairs. To make it again, in an environment of its own (pip install xllamacpp):

    import json, sys, urllib.request, xllamacpp
    gguf, fixture = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup = gguf, 256, False
    server = xllamacpp.Server(params)
    def ids(text):
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = urllib.request.Request(server.listening_address + "/tokenize", body)
        return json.load(urllib.request.urlopen(request))["tokens"]
    pairs = [[text, ids(text)] for text, _ in json.load(open(fixture))]
    open(fixture, "w").write("[\\n" + ",\\n".join(map(json.dumps, pairs)) + "\\n]\\n")
"""

import argparse
import inspect
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Punctuation, Sequence, Split
from transformers import PreTrainedTokenizerFast

from halimede.engine.loader.gguf_pretokenizer import PRE_TOKENIZATIONS, build_pre_tokenizer
from halimede.engine.loader.gguf_tokenizer import load_gguf_tokenizer
from halimede.errors import ModelLoadError, UnsupportedModelError

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<think>", "  ## ", "日本"]
SAMPLES = (
    "Hello, world! It's the END of 12345; I'll've 3.14 €, won't you?\n\n\tdef f(x): return x**2  # ok\r\n",
    "CamelCase snake_case HTTPServer iPhone ÉCOLE École straße Ελλάδα Привет мир שלום مرحبا नमस्ते ไทย 한국어",
    "日本語のテキスト。中文\uff0c测试\uff01\u0661\u0662\u0663 Ⅳ ½ ² e\u0301 ﬁ \u00a0\u3000\u200b\u2028 "
    "👩\u200d👧 🏳️ \U0001d400\U0001d41b Հայերեն",
    "{'a': [1, 22, 333]} <b>&amp;</b> a+b==c != d -> e::f // $100 100% a@b.c `x` ^_^ ~/dir | ¿qué? «oui» ---",
)
CHARACTERS = [*"".join(SAMPLES), *" \n\t\r'.0123456789aAeEsStT" * 8, "\x00", "\x7f", "▁", "Ġ"]


def corpus() -> list[str]:
    return [*SAMPLES * 4, *inspect.getsource(argparse).splitlines(keepends=True)]


def fuzz_texts(count: int, specials: list[str]) -> list[str]:
    rng = random.Random(0)
    pieces = [*CHARACTERS, *specials * 3, *(word for text in SAMPLES for word in text.split(" "))]
    texts = ["".join(rng.choices(pieces, k=rng.randrange(1, 40))) for _ in range(count)]
    lines = corpus()
    return [
        "",
        " ",
        "\n",
        *SAMPLES,
        *specials,
        *texts,
        *("".join(rng.choices(lines, k=3)) for _ in range(20)),
    ]


def split(*patterns: str) -> list[PreTokenizer]:
    return [Split(Regex(pattern), "isolated") for pattern in patterns]


def byte_level(*, use_regex: bool = False) -> PreTokenizer:
    return ByteLevel(add_prefix_space=False, use_regex=use_regex)


GPT2 = [byte_level(use_regex=True)]
DIGITS = [Digits(individual_digits=True), byte_level(use_regex=True)]
LLAMA3 = split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
)
QWEN2 = split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
)
TEKKEN = split(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
)
GPT4O = split(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
)
FALCON = [Punctuation("contiguous"), byte_level(use_regex=True), Digits(), *split("[0-9][0-9][0-9]")]
DEEPSEEK_CODER = [
    *split("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+"),
    Digits(individual_digits=True),
]

# Published normalizer, pre-tokenizer and ignore_merges, by the name that the converter gives them.
ORIGINALS: dict[str, tuple[bool, list[PreTokenizer], bool]] = {
    "gpt-2": (False, GPT2, False),
    "phi-2": (False, GPT2, False),
    "olmo": (True, GPT2, False),
    "mpt": (True, GPT2, False),
    "smollm": (False, DIGITS, False),
    "starcoder": (False, DIGITS, False),
    "refact": (False, DIGITS, False),
    "command-r": (True, DIGITS, False),
    "llama-bpe": (False, [*LLAMA3, byte_level()], True),
    "qwen2": (True, [*QWEN2, byte_level()], False),
    "deepseek-r1-qwen": (True, [*QWEN2, byte_level()], False),
    "stablelm2": (True, [*QWEN2, byte_level()], False),
    "tekken": (False, [*TEKKEN, byte_level()], True),
    "gpt-4o": (False, [*GPT4O, byte_level()], False),
    "falcon": (False, FALCON, False),
    "deepseek-coder": (False, [*DEEPSEEK_CODER, byte_level()], False),
}


def train_original(nfc: bool, steps: list[PreTokenizer], ignore_merges: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=900, show_progress=False, initial_alphabet=ByteLevel.alphabet())
    tokenizer.train_from_iterator(corpus(), trainer)
    if ignore_merges:
        # Without its last merges the vocabulary has tokens that only ignore_merges finds.
        state = json.loads(tokenizer.to_str())
        state["model"] |= {"merges": state["model"]["merges"][:-250], "ignore_merges": True}
        tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in USER_DEFINED])
    return tokenizer


def metadata_of(tokenizer: Tokenizer, pre: str | None) -> dict[str, Any]:
    """What llama.cpp's converter writes for a byte-level BPE tokenizer."""
    size = tokenizer.get_vocab_size()
    tokens = [str(tokenizer.id_to_token(i)) for i in range(size)]
    kinds = [3 if token in CONTROL else 4 if token in USER_DEFINED else 1 for token in tokens]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        **({} if pre is None else {"tokenizer.ggml.pre": pre}),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.ggml.add_bos_token": False,
    }


@pytest.fixture(scope="module")
def smollm_metadata() -> dict[str, Any]:
    return metadata_of(train_original(*ORIGINALS["smollm"]), "smollm")


@pytest.fixture
def load(tmp_path: Path) -> Callable[[dict[str, Any]], PreTrainedTokenizerFast]:
    return lambda metadata: load_gguf_tokenizer(write_gguf(tmp_path / "m.gguf", metadata))


@pytest.mark.parametrize("pre", ORIGINALS)
def test_byte_level_families(pre: str, load: Callable[[dict[str, Any]], PreTrainedTokenizerFast]) -> None:
    original = train_original(*ORIGINALS[pre])
    loaded = load(metadata_of(original, pre))
    texts = fuzz_texts(400, CONTROL + USER_DEFINED)
    expected = [encoding.ids for encoding in original.encode_batch(texts)]
    assert loaded(texts).input_ids == expected
    for skip in (True, False):
        assert loaded.batch_decode(expected, skip_special_tokens=skip) == original.decode_batch(
            expected, skip
        )
    if not original.normalizer:
        assert loaded.batch_decode(expected) == texts
    assert loaded.bos_token == "<|im_start|>"
    assert loaded.eos_token == "<|endoftext|>"
    assert not loaded.add_bos_token


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2"])
def test_the_model_is_whole_and_the_added_tokens_keep_their_ids(
    pre: str, load: Callable[[dict[str, Any]], PreTrainedTokenizerFast]
) -> None:
    """Against the copy that transformers makes of a tokenizer that it is given."""
    metadata = metadata_of(train_original(*ORIGINALS[pre]), pre)
    # Added tokens at both ends of the vocabulary and in between.
    metadata["tokenizer.ggml.token_type"][3], metadata["tokenizer.ggml.token_type"][300] = 3, 4
    loaded = load(metadata)
    copied = PreTrainedTokenizerFast(tokenizer_object=loaded.backend_tokenizer, **loaded.init_kwargs)
    assert loaded.backend_tokenizer.to_str() == copied.backend_tokenizer.to_str()
    assert loaded.get_vocab() == copied.get_vocab()
    assert loaded.get_vocab() == {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    assert loaded.added_tokens_decoder == copied.added_tokens_decoder
    assert (len(loaded), loaded.vocab_size) == (len(copied), copied.vocab_size)


def test_families_differ() -> None:
    """The texts above tell the ways of cutting apart, so that a wrong entry in the table would show."""
    texts = fuzz_texts(400, [])
    outcomes = {
        pre: str([Sequence(steps).pre_tokenize_str(text) for text in texts])
        for pre, (_, steps, _) in ORIGINALS.items()
    }
    assert len(set(outcomes.values())) == 8


@pytest.mark.parametrize("pre", PRE_TOKENIZATIONS)
def test_every_entry_keeps_all_text(pre: str) -> None:
    pre_tokenizer, decoder = build_pre_tokenizer(PRE_TOKENIZATIONS[pre]), decoders.ByteLevel()
    for text in fuzz_texts(40, []):
        words = [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]
        assert decoder.decode(words) == text


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        (
            "deepseek-llm",
            "Hi there,12 \u0561\u0562 中文",
            ["Hi", " there", ",", "1", "2", " \u0561\u0562 ", "中文"],
        ),
        ("deepseek-v3", "a1234 日本x!?\n", ["a", "123", "4", " ", "日本", "x", "!?\n"]),
        ("viking", "one two, 345", ["one", " two", ",", " ", "3", "4", "5"]),
        ("default", "a+b 12345!", ["a", "+", "b", " ", "123", "45", "!"]),
        ("llama4", "HTTPServer's 1234", ["HTTPServer's", " ", "123", "4"]),
        ("exaone", "v12's", ["v", "1", "2", "'s"]),
        ("chatglm-bpe", "X 1234'LL", ["X", " ", "123", "4", "'LL"]),
        ("seed-coder", "a!\nb12", ["a", "!", "\n", "b", "1", "2"]),
    ],
)
def test_words(pre: str, text: str, words: list[str]) -> None:
    decoder = decoders.ByteLevel()
    found = build_pre_tokenizer(PRE_TOKENIZATIONS[pre]).pre_tokenize_str(text)
    assert [decoder.decode([word]) for word, _ in found] == words


def test_beginning_and_end_tokens(
    smollm_metadata: dict[str, Any], load: Callable[[dict[str, Any]], PreTrainedTokenizerFast]
) -> None:
    bos = smollm_metadata["tokenizer.ggml.bos_token_id"]
    eos = smollm_metadata["tokenizer.ggml.eos_token_id"]
    body = load(smollm_metadata)("Hello").input_ids
    metadata = smollm_metadata | {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    both = load(metadata)
    assert both("Hello").input_ids == [bos, *body, eos]
    assert both("Hello", add_special_tokens=False).input_ids == body
    assert both.decode([bos, *body, eos], skip_special_tokens=True) == "Hello"
    # Where the file does not say, Llama 3 and Mistral Nemo start with one and others do not.
    del metadata["tokenizer.ggml.add_bos_token"], metadata["tokenizer.ggml.add_eos_token"]
    for pre, starts in (("smollm", False), ("qwen2", False), ("llama-bpe", True), ("tekken", True)):
        found = load(metadata | {"tokenizer.ggml.pre": pre})("Hello").input_ids
        assert (found[0] == bos) is starts
        assert found[-1] != eos


def test_chat_templates(
    smollm_metadata: dict[str, Any], load: Callable[[dict[str, Any]], PreTrainedTokenizerFast]
) -> None:
    assert load(smollm_metadata).chat_template is None
    one = smollm_metadata | {"tokenizer.chat_template": "{{ messages[0].content }}!"}
    messages = [{"role": "user", "content": "hey"}]
    assert load(one).apply_chat_template(messages, tokenize=False) == "hey!"
    named = load(one | {"tokenizer.chat_template.tool_use": "tools: {{ messages[0].content }}"})
    assert named.apply_chat_template(messages, tokenize=False) == "hey!"
    assert named.apply_chat_template(messages, tokenize=False, chat_template="tool_use") == "tools: hey"


def test_missing_pre_tokenizer_is_the_default(
    smollm_metadata: dict[str, Any],
    load: Callable[[dict[str, Any]], PreTrainedTokenizerFast],
    caplog: pytest.LogCaptureFixture,
) -> None:
    explicit = load(smollm_metadata | {"tokenizer.ggml.pre": "default"})
    assert not caplog.records
    without = {key: value for key, value in smollm_metadata.items() if key != "tokenizer.ggml.pre"}
    assert load(without)(SAMPLES[0]).input_ids == explicit(SAMPLES[0]).input_ids
    assert "does not name its pre-tokenizer" in caplog.text


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"model": "t5"},
            UnsupportedModelError,
            r"tokenizer\.ggml\.model 't5'.*known: gpt2, llama.*tokenizer=",
        ),
        (
            {"pre": "nonesuch"},
            UnsupportedModelError,
            r"pre 'nonesuch' is not known; known: .*qwen2.*tokenizer=",
        ),
        ({"merges": None}, ModelLoadError, r"has no tokenizer\.ggml\.merges"),
        ({"merges": ["ab"]}, ModelLoadError, r"'ab' in tokenizer\.ggml\.merges is not a pair"),
        ({"merges": ["x yzzy"]}, ModelLoadError, r"contradict each other"),
        ({"merges": [1]}, ModelLoadError, r"tokenizer\.ggml\.merges is \[1\], but should be an array of str"),
        ({"tokens": None}, ModelLoadError, r"has no tokenizer\.ggml\.tokens"),
        ({"tokens": ["a", "b", "a"]}, ModelLoadError, r"token 'a' is in tokenizer\.ggml\.tokens twice"),
        ({"token_type": [1, 1]}, ModelLoadError, r"but 2 tokenizer\.ggml\.token_type"),
    ],
)
def test_bad_metadata(
    smollm_metadata: dict[str, Any],
    load: Callable[[dict[str, Any]], PreTrainedTokenizerFast],
    changed: dict[str, Any],
    error: type[ModelLoadError],
    message: str,
) -> None:
    metadata = smollm_metadata | {f"tokenizer.ggml.{key}": value for key, value in changed.items()}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    with pytest.raises(error, match=rf"m\.gguf.*{message}"):
        load(metadata)


def test_special_token_out_of_range(
    smollm_metadata: dict[str, Any],
    load: Callable[[dict[str, Any]], PreTrainedTokenizerFast],
    caplog: pytest.LogCaptureFixture,
) -> None:
    loaded = load(smollm_metadata | {"tokenizer.ggml.padding_token_id": 10**6})
    assert loaded.pad_token is None
    assert "the pad token 1000000 is not in the vocabulary" in caplog.text


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> PreTrainedTokenizerFast:
    return load_gguf_tokenizer(smollm2_gguf)


def test_real_file_like_llama_cpp(smollm2: PreTrainedTokenizerFast) -> None:
    pairs = json.loads((Path(__file__).parent / "smollm2_tokens.json").read_text())
    assert len(pairs) > 150
    for text, ids in pairs:
        assert smollm2(text).input_ids == ids, text
        assert smollm2.decode(ids) == text


def test_real_file_chat(smollm2: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    text = smollm2.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = smollm2.apply_chat_template(messages, add_generation_prompt=True).input_ids
    assert ids == smollm2(text).input_ids
    assert ids[0] == 1
    assert (smollm2.bos_token_id, smollm2.eos_token_id, smollm2.pad_token_id) == (1, 2, 2)
    assert "<|im_start|>" not in smollm2.decode(ids, skip_special_tokens=True)
