"""Tokenizers of Llama 2's kind out of GGUF metadata, against sentencepiece and transformers."""

import io
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from gguf_files import write_gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from halimede.engine.loader.gguf_tokenizer import load_gguf_tokenizer
from halimede.errors import ModelLoadError

LINES = [
    "Hello, world! It's the end of 12345 days; won't you come? The quick brown fox jumps over the lazy dog.",
    "def main(argv):\n    return {'a': [1, 22, 333]}  # done, and the rest of the words follow",
    "Привет мир, straße École, 日本語のテキスト, naïve café 3.14 and so on and on and on",
    "    four spaces, then more words: the theory of the thing that they then thought through",
]
PIECES = [*"".join(LINES), *" \n\t" * 12, *"€😀ß漢\u0301▁", "</s>", "<s>", "[SEP]", "  ", "    "]


@pytest.fixture(scope="module")
def original() -> sentencepiece.SentencePieceProcessor:
    """Trained with the options of Llama 2's tokenizer."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=520,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=0.98,
        user_defined_symbols=["[SEP]"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def metadata(original: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """What llama.cpp's converter writes."""
    ids = range(original.vocab_size())
    kinds = {
        **dict.fromkeys(ids, 1),
        **{i: 6 for i in ids if original.is_byte(i)},
        **{i: 3 for i in ids if original.is_control(i)},
        original.unk_id(): 2,
        original.piece_to_id("[SEP]"): 4,
    }
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [original.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [original.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [kinds[i] for i in ids],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def texts(*, special: bool) -> list[str]:
    rng = random.Random(0)
    pieces = [piece for piece in PIECES if special or piece not in ("</s>", "<s>", "[SEP]")]
    words = " ".join(LINES).split(" ")
    made = ["".join(rng.choices([*pieces, *words], k=rng.randrange(1, 30))) for _ in range(400)]
    return ["", " ", "a", " a", "\n", *LINES, *made]


def load(path: Path, metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    return load_gguf_tokenizer(write_gguf(path / "m.gguf", metadata))


def test_like_sentencepiece(
    tmp_path: Path, original: sentencepiece.SentencePieceProcessor, metadata: dict[str, Any]
) -> None:
    loaded = load(tmp_path, metadata)
    for text in texts(special=False):
        assert loaded(text).input_ids == [1, *original.encode(text)], text
        assert loaded.decode(original.encode(text)) == text.replace("▁", " ")


def test_like_transformers(
    tmp_path: Path, original: sentencepiece.SentencePieceProcessor, metadata: dict[str, Any]
) -> None:
    """With special tokens in the text: the pipeline of Llama 2's published tokenizer.json."""
    vocab = {original.id_to_piece(i): i for i in range(original.vocab_size())}
    scores = {piece: original.get_score(i) for piece, i in vocab.items()}
    expected = Tokenizer(
        models.BPE(
            vocab, generate_merges(vocab, scores), unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    expected.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    expected.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    expected.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    expected.add_tokens([AddedToken("[SEP]", normalized=False)])
    loaded = load(tmp_path, metadata)
    for text in texts(special=True):
        ids = expected.encode(text).ids
        assert loaded(text, add_special_tokens=False).input_ids == ids, text
        assert loaded.decode(ids) == expected.decode(ids, skip_special_tokens=False)
        assert loaded.decode(ids, skip_special_tokens=True) == expected.decode(ids)


def test_space_prefix(tmp_path: Path, metadata: dict[str, Any]) -> None:
    with_prefix = load(tmp_path, metadata)
    without = load(tmp_path, metadata | {"tokenizer.ggml.add_space_prefix": False})
    assert without(" Hello").input_ids == with_prefix("Hello").input_ids
    assert without("Hello").input_ids != with_prefix("Hello").input_ids
    for text in ("Hello", " Hello", "  a\n b"):
        assert without.decode(without(text).input_ids, skip_special_tokens=True) == text


def test_beginning_and_end_tokens(tmp_path: Path, metadata: dict[str, Any]) -> None:
    body = load(tmp_path, metadata)("the end", add_special_tokens=False).input_ids
    for added, expected in (
        ({}, [1, *body]),
        ({"tokenizer.ggml.add_bos_token": False}, body),
        ({"tokenizer.ggml.add_eos_token": True}, [1, *body, 2]),
    ):
        assert load(tmp_path, metadata | added)("the end").input_ids == expected
    # Files from before these keys: SentencePiece's usual ids.
    old = {key: value for key, value in metadata.items() if not key.endswith("_token_id")}
    loaded = load(tmp_path, old)
    assert (loaded.unk_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert loaded("the end").input_ids == [1, *body]


def test_without_scores_ids_are_the_order(
    tmp_path: Path, original: sentencepiece.SentencePieceProcessor, metadata: dict[str, Any]
) -> None:
    """As converted from a tokenizer.json, where all scores are alike."""
    scores = [-1000.0] * original.vocab_size()
    loaded = load(tmp_path, metadata | {"tokenizer.ggml.scores": scores})
    for text in LINES:
        assert loaded(text).input_ids == [1, *original.encode(text)]


def test_bad_scores(tmp_path: Path, metadata: dict[str, Any]) -> None:
    with pytest.raises(
        ModelLoadError, match=r"m\.gguf: 520 tokenizer\.ggml\.tokens, but 1 tokenizer\.ggml\.scores"
    ):
        load(tmp_path, metadata | {"tokenizer.ggml.scores": [0.5]})
