"""Loads a tokenizer in Hugging Face's form through transformers, without the models behind it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halimede.engine.config import EngineConfig
from halimede.engine.models.registry import SUPPORTED_ARCHITECTURES
from halimede.errors import ModelLoadError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# All that AutoTokenizer reads of a config to choose the class of the tokenizer.
_READ_BY_AUTO_TOKENIZER = ("model_type", "model_name", "tokenizer_class")


def load_hf_tokenizer(source: str, config: EngineConfig) -> "PreTrainedTokenizerBase":
    """The tokenizer in the directory `source` or of the Hugging Face id `source`.

    Raises ModelLoadError when transformers cannot load it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            source,
            config=None if config.trust_remote_code else _plain_config(Path(source)),
            revision=config.tokenizer_revision if config.tokenizer else None,
            token=config.hf_token,
            cache_dir=config.download_dir,
            trust_remote_code=config.trust_remote_code,
        )
    # transformers raises whatever its parsers raise: OSError, ValueError, KeyError, bare Exception.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelLoadError(
            f"the tokenizer in {source} cannot be loaded ({reason}); check its tokenizer files, or pass "
            "tokenizer=... to use another one"
        ) from error


def _plain_config(folder: Path) -> "PreTrainedConfig | None":
    """The fields of `folder`'s config.json that AutoTokenizer reads; None where it must read it itself.

    To learn them, AutoTokenizer makes the model's own config object, and for its class transformers 5 imports
    its kernels, torch._dynamo, torch.distributed and sympy: 1.6 s, ten times what the tokenizer takes.
    The class of the config decides only where tokenizer_config.json does not name the tokenizer's class, or
    where code comes with the checkpoint.
    """
    from transformers import PreTrainedConfig

    tokenizer_config = _read_object(folder / "tokenizer_config.json")
    model_config = _read_object(folder / "config.json")
    architectures = model_config.get("architectures")
    is_plain = (
        (folder / "tokenizer.json").is_file()
        and _is_name(tokenizer_config.get("tokenizer_class"))
        and "auto_map" not in tokenizer_config
        and "auto_map" not in model_config
        # Of these it is known that the config object says the same model_type as the file; tests hold it.
        and isinstance(architectures, list)
        and bool(architectures)
        and all(name in SUPPORTED_ARCHITECTURES for name in architectures)
        and _is_name(model_config.get("model_type"))
        # Except for this one, which transformers takes for another type.
        and not (model_config["model_type"] == "mistral" and "layer_types" in model_config)
    )
    if not is_plain:
        return None
    fields = {name: model_config[name] for name in _READ_BY_AUTO_TOKENIZER if name in model_config}
    fields["name_or_path"] = str(folder)
    return PreTrainedConfig(**fields)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file; empty if there is none, which transformers will report."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
