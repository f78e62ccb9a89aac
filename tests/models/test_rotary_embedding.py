"""Cosines and sines of every rope type against transformers', and the reading of both config forms."""

from typing import Any

import pytest
import torch
from tolerances import ROPE_TABLE

from halimede.engine.config_fields import ConfigFields
from halimede.engine.layers.rotary import RotaryEmbedding, rope_frequencies
from halimede.engine.models.rope_fields import read_rope
from halimede.errors import ModelLoadError, UnsupportedModelError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0},
    "llama 3.1": LLAMA3 | {"rope_theta": 500000.0},
    "llama3 short": LLAMA3 | {"rope_theta": 10000.0, "original_max_position_embeddings": 64},
    "yarn": YARN | {"rope_theta": 10000.0},
    "yarn of Qwen": YARN | {"rope_theta": 1000000.0, "original_max_position_embeddings": 32768},
    "yarn not truncated": YARN | {"rope_theta": 150000.0, "truncate": False, "beta_fast": 24, "beta_slow": 2},
    "yarn attention factor": YARN | {"rope_theta": 10000.0, "attention_factor": 0.75},
    "yarn mscale": YARN | {"rope_theta": 10000.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn not extended": YARN | {"rope_theta": 10000.0, "factor": 1.0},
}


def _fields(rope: dict[str, Any], form: str = "rope_parameters", **more: Any) -> ConfigFields:
    return ConfigFields({form: rope, "max_position_embeddings": 256} | more, "config.json")


def _ours(fields: ConfigFields, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    embedding = RotaryEmbedding(read_rope(fields, head_dim))
    embedding.prepare(torch.device("cpu"), 256)
    cos, sin = embedding(torch.arange(256))
    return cos, sin


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_cosines_and_sines_equal_transformers(rope: dict[str, Any], head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=256,
        rope_parameters=dict(rope),
    )
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(256)[None])
    for actual, expected in zip(_ours(_fields(rope), head_dim), theirs, strict=True):
        half = expected[0, :, : head_dim // 2]
        torch.testing.assert_close(actual, half, rtol=ROPE_TABLE[0], atol=ROPE_TABLE[1])


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_the_form_before_transformers_5_reads_the_same(rope: dict[str, Any]) -> None:
    old = {name: value for name, value in rope.items() if name != "rope_theta"}
    old["type"] = old.pop("rope_type")
    fields = _fields(old, "rope_scaling", rope_theta=rope["rope_theta"])
    assert read_rope(fields, 64) == read_rope(_fields(rope), 64)


def test_no_rope_settings_mean_theta_10000() -> None:
    rope = read_rope(ConfigFields({"max_position_embeddings": 64, "rope_scaling": None}, "config.json"), 32)
    assert (rope.rope_type, rope.rope_theta, rope.rotary_dim) == ("default", 10000.0, 32)


def test_yarn_takes_its_context_and_factor_from_the_config_when_it_has_none() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0}
    read = read_rope(_fields(rope, original_max_position_embeddings=64), 32)
    assert (read.factor, read.original_max_position_embeddings) == (4.0, 64)


def test_factors_divide_each_frequency() -> None:
    plain = read_rope(_fields({"rope_type": "default", "rope_theta": 10000.0}), 8)
    divided = read_rope(
        _fields({"rope_type": "factors", "rope_theta": 10000.0, "factors": [1.0, 2.0, 4, 8.5]}), 8
    )
    expected = rope_frequencies(plain) / torch.tensor([1.0, 2.0, 4.0, 8.5])
    assert torch.equal(rope_frequencies(divided), expected)


def test_a_partial_factor_rotates_the_first_dimensions() -> None:
    rope = read_rope(_fields({"rope_theta": 10000.0, "partial_rotary_factor": 0.5}), 64)
    assert rope.rotary_dim == 32
    assert torch.equal(
        rope_frequencies(rope), rope_frequencies(read_rope(_fields({"rope_theta": 10000.0}), 32))
    )


def test_the_table_stays_float32_and_off_the_meta_device() -> None:
    with torch.device("meta"):
        embedding = RotaryEmbedding(read_rope(_fields(ROPES["llama 3.1"]), 16))
    embedding.prepare(torch.device("cpu"), 10)
    cos, _ = embedding(torch.tensor([9, 0]))
    assert (cos.dtype, cos.device.type, cos.shape) == (torch.float32, "cpu", (2, 8))


@pytest.mark.parametrize(
    ("rope", "error", "message"),
    [
        ({"rope_type": "longrope"}, UnsupportedModelError, "'longrope' is not supported; supported: default"),
        ({"type": "dynamic", "factor": 2.0}, UnsupportedModelError, "'dynamic' is not supported"),
        ({"full_attention": {"rope_type": "default"}}, UnsupportedModelError, "full_attention"),
        ({"rope_type": "linear"}, ModelLoadError, "has no 'factor'"),
        ({"rope_type": "linear", "factor": "two"}, ModelLoadError, "factor='two' must be a number"),
        (LLAMA3 | {"high_freq_factor": 1.0}, ModelLoadError, "high_freq_factor=1.0 must be greater"),
        ({"rope_type": "factors", "factors": [1.0]}, ModelLoadError, "a list of 8 numbers"),
        ({"partial_rotary_factor": 0.3}, ModelLoadError, "of head_dim=10 rotates 3 dimensions"),
        ({"partial_rotary_factor": 2.0}, ModelLoadError, "rotates 32"),
        ({"rope_type": 3}, ModelLoadError, "rope_type=3 must be a string"),
    ],
)
def test_settings_that_cannot_be(rope: dict[str, Any], error: type[Exception], message: str) -> None:
    head_dim = 10 if rope.get("partial_rotary_factor") == 0.3 else 16
    with pytest.raises(error, match=message) as raised:
        read_rope(_fields(rope), head_dim)
    assert "config.json" in str(raised.value)
