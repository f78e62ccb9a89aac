"""A Hugging Face tokenizer, rebuilt from the vocabulary in a GGUF's metadata.

transformers has a conversion of its own, which knows one way of cutting text per architecture and so
tokenizes SmolLM2, among others, differently from the original; this one goes by `tokenizer.ggml.pre`.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halimede.engine.loader.gguf_file import GgufFile, open_gguf
from halimede.errors import ModelLoadError, UnsupportedModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_CHAT_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    tokens: list[str]
    types: list[int]
    ids: dict[str, int]
    special_ids: dict[str, int]  # "bos", "eos", "unk", "pad", as far as the file names them


def load_gguf_tokenizer(path: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer in the metadata of `path` (of the first shard, if there are several).

    Control tokens become special tokens; chat template, beginning- and end-of-text tokens come along.

    Raises UnsupportedModelError for a kind of tokenizer that is not implemented, ModelLoadError for missing
    or contradicting metadata and for an unreadable file.
    """
    file = open_gguf(path)
    kind = file.need("tokenizer.ggml.model", str)
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(
            f"{path}: tokenizer.ggml.model {kind!r} is not supported; known: gpt2, llama. Give the original "
            "model's tokenizer with tokenizer=..."
        )
    vocabulary = _read_vocabulary(file, kind)
    try:
        if kind == "gpt2":
            backend, add_bos = _build_byte_level(file, vocabulary)
        else:
            backend, add_bos = _build_sentencepiece(file, vocabulary), True
        _add_special_tokens(backend, vocabulary)
    except ModelLoadError:
        raise
    except Exception as error:  # tokenizers raises nothing more specific
        raise ModelLoadError(
            f"{path}: the tokenizer's metadata contradict each other: {error}; convert the model to GGUF "
            "again or give the original model's tokenizer with tokenizer=..."
        ) from error
    add = file.find("tokenizer.ggml.add_bos_token", bool)
    special = {f"{name}_token": vocabulary.tokens[i] for name, i in vocabulary.special_ids.items()}
    return _wrap(
        backend,
        chat_template=_chat_template(file),
        clean_up_tokenization_spaces=False,
        add_bos_token="bos" in vocabulary.special_ids and (add_bos if add is None else add),
        add_eos_token="eos" in vocabulary.special_ids
        and bool(file.find("tokenizer.ggml.add_eos_token", bool)),
        **special,
    )


def _wrap(backend: "Tokenizer", **options: Any) -> "PreTrainedTokenizerFast":
    """transformers' tokenizer over `backend`.

    It takes a copy, by way of JSON: 1.4 s for 262k tokens. So the model that is copied has the added tokens
    only, which keep their ids by it, and the whole one is put in its place.
    """
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    model = backend.model
    added = {token.content: i for i, token in backend.get_added_tokens_decoder().items()}
    backend.model = models.BPE(vocab=added, merges=[])
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, **options
    )
    tokenizer.backend_tokenizer.model = model
    return tokenizer


def _read_vocabulary(file: GgufFile, kind: str) -> _Vocabulary:
    tokens = file.find_array("tokenizer.ggml.tokens", str)
    if not tokens:
        raise ModelLoadError(
            f"{file.path} has no tokenizer.ggml.tokens; give the original model's tokenizer with "
            "tokenizer=..."
        )
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(ids) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise ModelLoadError(
            f"{file.path}: token {twice!r} is in tokenizer.ggml.tokens twice; convert the model to GGUF again"
        )
    types = file.find_array("tokenizer.ggml.token_type", int) or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ModelLoadError(
            f"{file.path}: {len(tokens)} tokenizer.ggml.tokens, but {len(types)} tokenizer.ggml.token_type; "
            "convert the model to GGUF again"
        )
    # What SentencePiece models have when the file does not say, as in llama.cpp.
    special_ids = {"unk": 0, "bos": 1, "eos": 2} if kind == "llama" else {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = file.find(f"tokenizer.ggml.{key}_token_id", int)
        if token_id is not None:
            special_ids[name] = token_id
    for name, token_id in list(special_ids.items()):
        if not 0 <= token_id < len(tokens):
            logger.warning("%s: the %s token %d is not in the vocabulary", file.path, name, token_id)
            del special_ids[name]
    return _Vocabulary(tokens, types, ids, special_ids)


def _build_byte_level(file: GgufFile, vocabulary: _Vocabulary) -> "tuple[Tokenizer, bool]":
    """GPT-2's kind of BPE, and whether it puts a beginning-of-text token first by default."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    from halimede.engine.loader.gguf_pretokenizer import PRE_TOKENIZATIONS, build_pre_tokenizer

    name = file.find("tokenizer.ggml.pre", str)
    if name is None:
        logger.warning(
            "%s does not name its pre-tokenizer (tokenizer.ggml.pre); tokens may differ from the original's",
            file.path,
        )
    scheme = PRE_TOKENIZATIONS.get(name or "default")
    if scheme is None:
        raise UnsupportedModelError(
            f"{file.path}: tokenizer.ggml.pre {name!r} is not known; known: {', '.join(PRE_TOKENIZATIONS)}. "
            "Give the original model's tokenizer with tokenizer=..."
        )
    lines = file.find_array("tokenizer.ggml.merges", str)
    if lines is None:
        raise ModelLoadError(f"{file.path} has no tokenizer.ggml.merges; convert the model to GGUF again")
    merges = [_split_merge(line, file) for line in lines]
    backend = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=scheme.ignore_merges))
    if scheme.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = build_pre_tokenizer(scheme)
    backend.decoder = decoders.ByteLevel()
    return backend, scheme.add_bos


def _split_merge(line: str, file: GgufFile) -> tuple[str, str]:
    middle = line.find(" ", 1)
    if middle < 0:
        raise ModelLoadError(
            f"{file.path}: {line!r} in tokenizer.ggml.merges is not a pair; convert the model to GGUF again"
        )
    return line[:middle], line[middle + 1 :]


def _build_sentencepiece(file: GgufFile, vocabulary: _Vocabulary) -> "Tokenizer":
    """SentencePiece's kind of BPE, as Llama 2 and Mistral have it: spaces are "▁", unknown text is bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.find_array("tokenizer.ggml.scores", float) or [0.0] * len(vocabulary.tokens)
    if len(scores) != len(vocabulary.tokens):
        raise ModelLoadError(
            f"{file.path}: {len(vocabulary.tokens)} tokenizer.ggml.tokens, but {len(scores)} "
            "tokenizer.ggml.scores; convert the model to GGUF again"
        )
    unk = vocabulary.special_ids.get("unk")
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=_merges_by_score(vocabulary, scores),
            unk_token=None if unk is None else vocabulary.tokens[unk],
            fuse_unk=True,
            byte_fallback="<0x00>" in vocabulary.ids,
        )
    )
    prefix = file.find("tokenizer.ggml.add_space_prefix", bool) is not False
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace] if prefix else [replace])
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _merges_by_score(vocabulary: _Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the pair whose union is the token of the highest score; BPE wants a list of pairs.

    Equal scores go by id, as in the files whose converter had no scores, where the ids are in merge order. Of
    the pairs with one union the one whose left part is longest comes first.
    """
    made = [i for i, kind in enumerate(vocabulary.types) if kind in (_NORMAL, _USER_DEFINED)]
    made.sort(key=lambda i: -scores[i])
    known = set(vocabulary.tokens)  # quicker to search than a dictionary, a million times
    return [
        (left, right)
        for token in map(vocabulary.tokens.__getitem__, made)
        for middle in range(len(token) - 1, 0, -1)
        if (left := token[:middle]) in known and (right := token[middle:]) in known
    ]


def _add_special_tokens(backend: "Tokenizer", vocabulary: _Vocabulary) -> None:
    from tokenizers import AddedToken

    special_ids = set(vocabulary.special_ids.values())
    special, plain = [], []
    for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind in (_CONTROL, _UNKNOWN) or i in special_ids:
            special.append(AddedToken(token, special=True, normalized=False))
        elif kind == _USER_DEFINED:
            plain.append(AddedToken(token, special=False, normalized=False))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)


def _chat_template(file: GgufFile) -> str | dict[str, str] | None:
    default = file.find(_CHAT_TEMPLATE, str)
    prefix = _CHAT_TEMPLATE + "."
    named = {
        key.removeprefix(prefix): file.need(key, str) for key in file.list_keys() if key.startswith(prefix)
    }
    if not named:
        return default
    return named if default is None else {"default": default, **named}
