"""Changes to a model's config.json that the user asks for: the setting hf_overrides."""

from collections.abc import Callable, Mapping
from typing import Any

from halimede.errors import ConfigError


class _Attributes(dict[str, Any]):
    """A dictionary whose items are attributes too: functions written for vLLM set them on a config object."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"the config has no {name!r}; it has: {', '.join(map(str, self))}")
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]


def apply_hf_overrides(
    config: Mapping[str, Any], overrides: Mapping[str, Any] | Callable[[Any], Any]
) -> dict[str, Any]:
    """The config with the overrides; `config` is not changed.

    A mapping is laid over it: objects in both are merged in the same way, everything else is replaced, and
    None makes a field count as missing. A function gets the config, whose fields are items and attributes
    alike, and returns it or a new one. Raises ConfigError when the function fails or returns something else.
    """
    if isinstance(overrides, Mapping):
        return _merge(config, overrides)
    name = getattr(overrides, "__name__", repr(overrides))
    try:
        result = overrides(_with_attributes(config))
    except Exception as error:
        raise ConfigError(
            f"hf_overrides: {name} failed with {type(error).__name__}: {error}; it gets config.json as a "
            "dict and must return one"
        ) from error
    if not isinstance(result, Mapping):
        raise ConfigError(f"hf_overrides: {name} returned {result!r}; it must return the config, a dict")
    return {field: _plain(value) for field, value in result.items()}


def _merge(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for name, value in overrides.items():
        old = merged.get(name)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = _merge(old, value)
        merged[name] = value
    return merged


def _with_attributes(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _Attributes({name: _with_attributes(item) for name, item in value.items()})
    return [_with_attributes(item) for item in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
