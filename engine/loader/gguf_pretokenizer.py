"""How each family of byte-level BPE tokenizers cuts text into words, by the name that GGUF gives it.

A GGUF carries vocabulary and merges, but of the rest only the name `tokenizer.ggml.pre`. The table states
what the tokenizer.json of the original models says. Sources of the facts: those files; llama.cpp's
src/llama-vocab.cpp for the names and for "default", which is its own.
"""

import re
from dataclasses import dataclass, replace

from tokenizers import Regex, pre_tokenizers

# Steps that are not regexes.
_DIGITS = "<each digit alone>"
_DIGIT_RUNS = "<runs of digits>"
_PUNCTUATION = "<runs of punctuation>"
_GPT2_WORDS = "<GPT-2's words, turned into bytes>"


@dataclass(frozen=True, slots=True)
class PreTokenization:
    """What happens to text before the merges: `steps` cut it one after the other, then it becomes bytes.

    A step is a regex, whose matches become words of their own, or one of this module's constants. `nfc`:
    Unicode normalization comes first. `ignore_merges`: a word that is a token is taken whole. `add_bos`: the
    default where the file does not say.
    """

    steps: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


def build_pre_tokenizer(scheme: PreTokenization) -> pre_tokenizers.PreTokenizer:
    """The tokenizers library's form of `scheme`."""
    steps = [_build_step(step) for step in scheme.steps]
    if _GPT2_WORDS not in scheme.steps:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return pre_tokenizers.Sequence(steps)


def _build_step(step: str) -> pre_tokenizers.PreTokenizer:
    if step == _DIGITS:
        return pre_tokenizers.Digits(individual_digits=True)
    if step == _DIGIT_RUNS:
        return pre_tokenizers.Digits(individual_digits=False)
    if step == _PUNCTUATION:
        return pre_tokenizers.Punctuation("contiguous")
    if step == _GPT2_WORDS:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Split(Regex(step), "isolated")


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACE = r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cl100k(digits: str) -> str:
    """tiktoken's cl100k pattern: contractions, letters, `digits`, punctuation with line ends, space."""
    return rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_SPACE}"


def _o200k(digits: str, contraction: str) -> str:
    """tiktoken's o200k pattern: a word ends where a lower-case letter meets an upper-case one, too."""
    before = r"[^\r\n\p{L}\p{N}]?"
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    words = f"{before}{upper}*{lower}+{contraction}|{before}{upper}+{lower}*{contraction}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACE}"


def _any_of(code_points: str) -> str:
    """A run of characters from ranges in hexadecimal, as in "41-5A B5"."""
    return "[" + re.sub(r"[0-9A-F]+", r"\\x{\g<0>}", code_points).replace(" ", "") + "]+"


# DeepSeek's list of letters that have a case; it knows neither Armenian small letters nor mathematical ones.
_DEEPSEEK_LETTERS = _any_of(
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A "
    "38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF "
    "1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D "
    "1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 "
    "1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F "
    "2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F "
    "A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 "
    "104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
_DEEPSEEK_PUNCTUATION = _any_of("21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002")
_DEEPSEEK_CJK = _any_of("4E00-9FA5 800-4E00 AC00-D7FF")
_DEEPSEEK_V3_CJK = _any_of("4E00-9FA5 3040-309F 30A0-30FF")
_DEEPSEEK_V3_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*" + _SPACE
)

_BLOOM_WORDS = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{964}\x{6D4}\x{60C})]+"
_GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SEED_WORDS = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+" + _SPACE

_GPT2 = PreTokenization((_GPT2_WORDS,))
_GPT2_DIGITS = PreTokenization((_DIGITS, _GPT2_WORDS))
_GPT4 = PreTokenization((_cl100k(r"\p{N}{1,3}"),))
_GPT4O = PreTokenization((_o200k(r"\p{N}{1,3}", _CONTRACTION + "?"),))
_LLAMA3 = replace(_GPT4, ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenization((_cl100k(r"\p{N}"),), nfc=True)
_BLOOM = PreTokenization((_BLOOM_WORDS,))

PRE_TOKENIZATIONS = {
    "a.x-4.0": _GPT2,
    "bloom": _BLOOM,
    "chatglm-bpe": _GPT4,
    "codeshell": _GPT2_DIGITS,
    "command-r": replace(_GPT2_DIGITS, nfc=True),
    "dbrx": _GPT4,
    "deepseek-coder": PreTokenization((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, _DIGITS)),
    "deepseek-llm": PreTokenization(
        (
            r"[\r\n]",
            r"\s?" + _DEEPSEEK_LETTERS,
            r"\s?" + _DEEPSEEK_PUNCTUATION,
            r"\s+$",
            _DEEPSEEK_CJK,
            _DIGITS,
        )
    ),
    "deepseek-r1-qwen": _QWEN2,
    "deepseek-v3": PreTokenization((r"\p{N}{1,3}", _DEEPSEEK_V3_CJK, _DEEPSEEK_V3_WORDS)),
    "default": PreTokenization((r"[\p{P}$+<=>^~|]+", _GPT2_REGEX, r"\p{N}+", "[0-9][0-9][0-9]")),
    "exaone": _GPT2_DIGITS,
    "exaone4": _GPT2,
    "falcon": PreTokenization((_PUNCTUATION, _GPT2_WORDS, _DIGIT_RUNS, "[0-9][0-9][0-9]")),
    "falcon3": _LLAMA3,
    "gigachat": _GPT2,
    "glm4": _GPT4,
    "gpt-2": _GPT2,
    "gpt-4o": _GPT4O,
    "gpt3-finnish": _BLOOM,
    "jais": _GPT2,
    "kanana2": _GPT4O,
    "kormo": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "llama4": _GPT4O,
    "megrez": _QWEN2,
    "mellum": _GPT2,
    "midm-2.0": _LLAMA3,
    "minerva-7b": _GPT2_DIGITS,
    "mpt": replace(_GPT2, nfc=True),
    "olmo": replace(_GPT2, nfc=True),
    "phi-2": _GPT2,
    "pixtral": _LLAMA3,
    "poro-chat": _BLOOM,
    "qwen2": _QWEN2,
    "refact": _GPT2_DIGITS,
    "seed-coder": PreTokenization((_SEED_WORDS,)),
    "smaug-bpe": _GPT4,
    "smollm": _GPT2_DIGITS,
    "stablelm2": _QWEN2,
    "starcoder": _GPT2_DIGITS,
    "tekken": PreTokenization((_o200k(r"\p{N}", ""),), ignore_merges=True, add_bos=True),
    "trillion": _GPT2,
    "viking": PreTokenization((_BLOOM_WORDS, r"\p{N}")),
}
"""`tokenizer.ggml.pre` -> how that family cuts text."""
