"""Tokenizers out of directories: those of AutoTokenizer, without the imports that it takes for them."""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_models import CORPUS, write_tiny_checkpoint

from halimede.engine.config import EngineConfig
from halimede.engine.loader import hf_tokenizer
from halimede.engine.loader.hf_tokenizer import load_hf_tokenizer
from halimede.engine.models.registry import SUPPORTED_ARCHITECTURES
from halimede.errors import ModelLoadError

CLASSES = (
    "TokenizersBackend",
    "PreTrainedTokenizerFast",
    "PreTrainedTokenizer",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "Qwen2Tokenizer",
    "GemmaTokenizerFast",
    "NobodysTokenizer",
)
TEXTS = ("", " ", "Hello</s>", "<s> a  b\n\n\tc", "  <pad>x", "e\u0301 \u00a0 日本語 🙂 1234567", *CORPUS)


@pytest.fixture(params=sorted(SUPPORTED_ARCHITECTURES))
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "m", request.param, tokenizer=True)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The config given to AutoTokenizer in each call; None is for its own way."""
    configs: list[Any] = []
    original = hf_tokenizer._plain_config

    def spy(folder: Path) -> Any:
        configs.append(original(folder))
        return configs[-1]

    monkeypatch.setattr(hf_tokenizer, "_plain_config", spy)
    return configs


def load(folder: Path, **options: Any) -> Any:
    return load_hf_tokenizer(str(folder), EngineConfig(model=str(folder), **options))


def outcome(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What it returns, or its error in words: a class that does not fit may be unable to encode."""
    try:
        return call(*args, **options)
    except Exception as error:
        return repr(error)


def edit(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def assert_same(loaded: Any, expected: Any) -> None:
    assert type(loaded) is type(expected)
    assert loaded.init_kwargs == expected.init_kwargs
    assert loaded.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    assert {name: str(value) for name, value in vars(loaded).items() if name != "_tokenizer"} == {
        name: str(value) for name, value in vars(expected).items() if name != "_tokenizer"
    }
    for text, special, skip in product(TEXTS, (True, False), (True, False)):
        ids = outcome(expected.encode, text, add_special_tokens=special)
        assert outcome(loaded.encode, text, add_special_tokens=special) == ids, text
        decoded = outcome(expected.decode, ids, skip_special_tokens=skip)
        assert outcome(loaded.decode, ids, skip_special_tokens=skip) == decoded, text
    assert loaded.all_special_ids == expected.all_special_ids
    assert (loaded.bos_token_id, loaded.eos_token_id) == (expected.bos_token_id, expected.eos_token_id)
    messages = [{"role": "user", "content": "Hello"}]
    rendered = loaded.apply_chat_template(messages, tokenize=False)
    assert rendered == expected.apply_chat_template(messages, tokenize=False)


def assert_like_auto_tokenizer(checkpoint: Path, **options: Any) -> None:
    """The same tokenizer, or an error with the same reason. options: of AutoTokenizer."""
    try:
        expected = transformers.AutoTokenizer.from_pretrained(checkpoint, **options)
    except Exception as error:
        with pytest.raises(ModelLoadError, match="cannot be loaded") as caught:
            load(checkpoint)
        assert " ".join(str(error).split()) in str(caught.value)
    else:
        assert_same(load(checkpoint), expected)


def test_like_auto_tokenizer(checkpoint: Path, chosen: list[Any]) -> None:
    """For every architecture and class of tokenizer, right for the model or not."""
    for name in CLASSES:
        edit(checkpoint / "tokenizer_config.json", tokenizer_class=name)
        assert_like_auto_tokenizer(checkpoint)
    assert all(config is not None for config in chosen)
    assert len(chosen) == len(CLASSES)


def test_added_tokens_and_flags(tmp_path: Path, chosen: list[Any]) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path, tokenizer=True)
    edit(
        checkpoint / "tokenizer_config.json",
        add_bos_token=False,
        add_eos_token=True,
        add_prefix_space=True,
        additional_special_tokens=["<x>", "garden"],
        extra_token="cat",
        added_tokens_decoder={"7": {"content": "the", "special": False, "lstrip": True}},
        model_max_length=77,
    )
    assert_same(load(checkpoint), transformers.AutoTokenizer.from_pretrained(checkpoint))
    assert chosen[0] is not None


def test_the_config_object_says_what_the_file_says(checkpoint: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    written = json.loads((checkpoint / "config.json").read_text())
    assert config.model_type == written["model_type"]
    for name in ("model_name", "tokenizer_class"):
        assert getattr(config, name, None) is None


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("tokenizer_config.json", {"tokenizer_class": None}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "code.MyTokenizer"]}}),
        ("config.json", {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}),
        ("config.json", {"architectures": None}),
        ("config.json", {"architectures": "LlamaForCausalLM"}),
        ("config.json", {"model_type": None}),
        ("config.json", {"model_type": "mistral", "layer_types": ["full_attention"] * 2}),
        ("config.json", {"auto_map": {"AutoConfig": "code.MyConfig"}}),
    ],
)
def test_left_to_auto_tokenizer(
    tmp_path: Path, chosen: list[Any], file: str, changes: dict[str, Any]
) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path, tokenizer=True)
    edit(checkpoint / file, **changes)
    assert_like_auto_tokenizer(checkpoint, trust_remote_code=False)
    assert chosen == [None]


def test_remote_code_is_left_to_auto_tokenizer(tmp_path: Path, chosen: list[Any]) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path, tokenizer=True)
    load(checkpoint, trust_remote_code=True)
    assert chosen == []


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("content", [None, b"{", b"[1]"])
def test_missing_and_broken_files(tmp_path: Path, file: str, content: bytes | None) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path, tokenizer=True)
    (checkpoint / file).unlink()
    if content is not None:
        (checkpoint / file).write_bytes(content)
    assert_like_auto_tokenizer(checkpoint)


def test_a_hub_id_is_left_to_auto_tokenizer(chosen: list[Any]) -> None:
    with pytest.raises(ModelLoadError, match="the tokenizer in nobody/nothing cannot be loaded"):
        load_hf_tokenizer("nobody/nothing", EngineConfig(model="m"))
    assert chosen == [None]


def test_imports_no_compiler(tmp_path: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path, tokenizer=True)
    code = f"""
import sys
from halimede.engine.config import EngineConfig
from halimede.engine.loader.hf_tokenizer import load_hf_tokenizer
load_hf_tokenizer({str(checkpoint)!r}, EngineConfig(model="m"))
print([name for name in ("torch._dynamo", "sympy", "transformers.models.llama") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
