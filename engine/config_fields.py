"""Typed reads of a Hugging Face config.json: a wrong field is an error that names the field and the file."""

from collections.abc import Mapping
from typing import Any

from halimede.errors import ModelLoadError


class ConfigFields:
    """The fields of one config, read by name and type.

    A reader without a default raises ModelLoadError when the field is missing or null; every reader raises
    it when the field has another type. A null field counts as missing.
    """

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self.source = source
        self._config = config

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._config.get(name) is not None

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        """A whole number of at least `minimum`."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.wrong(name, value, f"a whole number of at least {minimum}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number greater than 0."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.wrong(name, value, "a number greater than 0")
        return float(value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        """true or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, value, "a string")
        return value

    def optional_integer(self, name: str) -> int | None:
        """A whole number of at least 1, or None when the field is missing or null."""
        return self.integer(name) if self.has(name) else None

    def optional_number(self, name: str) -> float | None:
        """A number greater than 0, or None when the field is missing or null."""
        return self.number(name) if self.has(name) else None

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings; empty when the field is missing or null."""
        value = self._config.get(name) or ()
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self.wrong(name, value, "a list of strings")
        return tuple(value)

    def nested_texts(self, name: str) -> tuple[str, ...]:
        """A list of strings or of such lists, as one; empty when the field is missing or null."""
        value = self._config.get(name) or ()
        outer = value if isinstance(value, list | tuple) else (value,)
        items = [item for each in outer for item in (each if isinstance(each, list | tuple) else [each])]
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in items):
            raise self.wrong(name, value, "a list of strings, or of lists of them")
        return tuple(items)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of numbers greater than 0; empty when the field is missing or null."""
        value = self._config.get(name) or ()
        if not isinstance(value, list | tuple) or not all(
            isinstance(item, int | float) and item > 0 for item in value
        ):
            raise self.wrong(name, value, "a list of numbers greater than 0")
        return tuple(float(item) for item in value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One token id or a list of them; empty when the field is missing or null."""
        value = self._config.get(name)
        ids = () if value is None else value if isinstance(value, list | tuple) else (value,)
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.wrong(name, value, "a token id or a list of token ids")
        return tuple(ids)

    def section(self, name: str) -> "ConfigFields | None":
        """The fields of a nested object, or None when it is missing, null or empty."""
        value = self._config.get(name)
        if not value:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(name, value, "an object")
        return ConfigFields(value, f"{self.source} ({name})")

    def is_section(self, name: str) -> bool:
        """Whether the field is a nested object."""
        return isinstance(self._config.get(name), Mapping)

    def names(self) -> tuple[str, ...]:
        """The fields that are there, null ones included."""
        return tuple(self._config)

    def wrong(self, name: str, value: object, must: str) -> ModelLoadError:
        """The error for a field that is there with a value it cannot have."""
        return ModelLoadError(f"{self.source}: {name}={value!r} must be {must}; correct the config")

    def _value(self, name: str, default: Any) -> Any:
        value = self._config.get(name)
        if value is None:
            value = default
        if value is None:
            raise ModelLoadError(
                f"{self.source} has no {name!r}, which this model needs; "
                "use the config.json that was published with the checkpoint"
            )
        return value
