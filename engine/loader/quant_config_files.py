"""Quantization settings that lie in a file of their own beside config.json, as older exports have them.

    hf_quant_config.json     ModelOpt, its settings under "quantization"
    quantize_config.json     AutoGPTQ
    quant_config.json        AutoAWQ
Exports that say the same in config.json too, as newer ones do, have to agree with themselves.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from halimede.engine.loader.json_file import read_json_object
from halimede.errors import ModelLoadError

_METHODS: Mapping[str, str] = MappingProxyType(
    {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
)
QUANT_CONFIG_FILES = tuple(_METHODS)
# Settings that change what a weight is, by all the names they have.
_SETTINGS = (("bits", "w_bit"), ("group_size", "q_group_size"), ("quant_algo",))


def add_quant_config(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a folder, with a quantization_config made of such a file where it has none.

    Raises ModelLoadError where a file cannot be read, or says another method, other bits, another size of
    groups or another algorithm than config.json or than another file.
    """
    whole, source = dict(config), "config.json"
    for file, method in _METHODS.items():
        path = folder / file
        if not path.is_file():
            continue
        content = read_json_object(path)
        settings = content.get("quantization", {}) if method == "modelopt" else content
        if not isinstance(settings, Mapping):
            raise ModelLoadError(f"{path}: quantization={settings!r} must be an object; download it again")
        if method == "modelopt" and not settings.get("quant_algo"):
            continue  # the KV cache alone
        found = {"quant_method": method, **settings}
        present = whole.get("quantization_config") or whole.get("compression_config")
        if not present:
            whole["quantization_config"], source = found, file
        elif isinstance(present, Mapping):
            _check_agreement(folder / source, present, path, found)
    return whole


def _check_agreement(
    one_path: Path, one: Mapping[str, Any], other_path: Path, other: Mapping[str, Any]
) -> None:
    pairs = [("quant_method", _method(one), _method(other))]
    pairs += [(names[0], _setting(one, names), _setting(other, names)) for names in _SETTINGS]
    for name, value, other_value in pairs:
        if value is not None and other_value is not None and value != other_value:
            raise ModelLoadError(
                f"{one_path} says {name}={value!r}, but {other_path} says {name}={other_value!r}: remove the "
                "one that is not of these weights, or download both again"
            )


def _method(settings: Mapping[str, Any]) -> str:
    from halimede.engine.quant.registry import method_name  # with torch, which finding a model does not need

    given = str(settings.get("quant_method", "compressed-tensors")).lower()
    return method_name(given) or given


def _setting(settings: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """A setting by the first of its names that is there; ModelOpt may nest them."""
    inner = settings.get("quantization")
    every = {**settings, **(inner if isinstance(inner, Mapping) else {})}
    return next((every[name] for name in names if every.get(name) is not None), None)
