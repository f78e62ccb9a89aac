"""Changes to config.json that the user asks for."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from halimede.engine.loader.hf_overrides import apply_hf_overrides
from halimede.errors import ConfigError

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "deep": {"a": 1, "b": 2}},
    "text_config": {"hidden_size": 8},
}


def test_a_mapping_is_merged_at_every_depth() -> None:
    before = repr(CONFIG)
    changed = apply_hf_overrides(
        CONFIG, {"new": 1, "architectures": ["X"], "rope_parameters": {"rope_theta": 5e5, "deep": {"b": 3}}}
    )
    assert changed == {
        "architectures": ["X"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "deep": {"a": 1, "b": 3}},
        "text_config": {"hidden_size": 8},
        "new": 1,
    }
    assert repr(CONFIG) == before


def test_none_and_other_types_replace() -> None:
    changed = apply_hf_overrides(CONFIG, {"rope_parameters": None, "text_config": 3, "architectures": {}})
    assert changed == {"rope_parameters": None, "text_config": 3, "architectures": {}}


def test_a_function_of_items_or_of_attributes() -> None:
    def by_item(config: dict[str, Any]) -> dict[str, Any]:
        return {**config, "rope_parameters": {**config["rope_parameters"], "rope_theta": 5e5}}

    def by_attribute(config: Any) -> Any:
        config.rope_parameters.rope_theta = 5e5
        config.update({"text_config": config.text_config})
        return config

    for function in (by_item, by_attribute):
        changed = apply_hf_overrides(CONFIG, function)
        assert changed == apply_hf_overrides(CONFIG, {"rope_parameters": {"rope_theta": 5e5}})
        assert type(changed["rope_parameters"]) is dict
    assert CONFIG["rope_parameters"]["rope_theta"] == 1e4  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda config: None, "returned None"),
        (lambda config: config.nothing, "has no 'nothing'; it has: architectures"),
        (lambda config: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_functions_that_fail(function: Callable[[Any], Mapping[str, Any]], words: str) -> None:
    with pytest.raises(ConfigError, match=f"hf_overrides.*{words}"):
        apply_hf_overrides(CONFIG, function)
