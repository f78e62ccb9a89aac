"""ModelConfig.from_hf: what it reads, and what it says of configs that it cannot use."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VARIANTS, read_config, write_variant

from halimede.engine.models.config import ModelConfig
from halimede.engine.models.registry import SUPPORTED_ARCHITECTURES
from halimede.errors import ModelLoadError, UnsupportedModelError, UnsupportedQuantizationError

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
}


def _read(architecture: str = "LlamaForCausalLM", **fields: Any) -> ModelConfig:
    return ModelConfig.from_hf(BASE | {"architectures": [architecture]} | fields, "model/config.json")


def test_what_a_config_leaves_out() -> None:
    config = _read()
    assert (config.num_key_value_heads, config.head_dim) == (4, 16)
    assert config.sliding_windows == (None,) * 4
    assert (config.bos_token_ids, config.eos_token_ids, config.dtype) == ((), (), None)
    options = (config.tie_word_embeddings, config.attention_bias, config.mlp_bias, config.qk_norm)
    assert options == (False,) * 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_that_transformers_wrote(variant: str, tmp_path: Path) -> None:
    path = write_variant(tmp_path, variant)
    config, raw = read_config(path), json.loads((path / "config.json").read_text())
    assert config.architecture == VARIANTS[variant][0]
    assert config.dtype == torch.float32
    assert (config.bos_token_ids, config.eos_token_ids) == ((1,), (2,))
    for name in ("head_dim", "num_key_value_heads", "tie_word_embeddings"):
        assert getattr(config, name) == raw.get(name, getattr(config, name))


@pytest.mark.parametrize(
    ("given", "expected"), [(None, ()), (2, (2,)), ([128001, 128009], (128001, 128009)), (0, (0,))]
)
def test_token_ids(given: Any, expected: tuple[int, ...]) -> None:
    config = _read(bos_token_id=given, eos_token_id=given)
    assert config.bos_token_ids == config.eos_token_ids == expected


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype_under_its_old_and_new_name(name: str) -> None:
    assert _read(**{name: "bfloat16"}).dtype == torch.bfloat16
    assert _read(**{name: "torch.float16"}).dtype == torch.float16


def test_biases_of_each_architecture() -> None:
    def biases(architecture: str, **fields: Any) -> tuple[bool, bool, bool]:
        config = _read(architecture, **fields)
        return config.attention_bias, config.attention_output_bias, config.mlp_bias

    assert biases("LlamaForCausalLM", attention_bias=True) == (True, True, False)
    from_gguf = {"attention_bias": True, "attention_output_bias": False}
    assert biases("LlamaForCausalLM", **from_gguf) == (True, False, False)
    assert biases("LlamaForCausalLM", mlp_bias=True) == (False, False, True)
    assert biases("MistralForCausalLM") == (False, False, False)
    assert biases("Qwen2ForCausalLM") == (True, False, False)
    assert biases("Qwen3ForCausalLM") == (False, False, False)
    assert biases("Qwen3ForCausalLM", attention_bias=True) == (True, True, False)


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("architecture", "fields", "expected"),
    [
        ("LlamaForCausalLM", {"sliding_window": 8}, (None,) * 4),
        ("MistralForCausalLM", {"sliding_window": 8}, (8,) * 4),
        ("MistralForCausalLM", {"sliding_window": None}, (None,) * 4),
        ("MistralForCausalLM", {}, (4096,) * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 8, "max_window_layers": 2}, (None,) * 4),
        (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            (None, None, 8, 8),
        ),
        ("Qwen3ForCausalLM", {"use_sliding_window": True, "sliding_window": None}, (None,) * 4),
        (
            "Qwen3ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            (8,) * 4,
        ),
        (
            "Qwen3ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": [SLIDING, FULL, SLIDING, FULL]},
            (8, None, 8, None),
        ),
        ("Qwen3ForCausalLM", {"layer_types": [FULL] * 4}, (None,) * 4),
    ],
)
def test_sliding_windows(architecture: str, fields: dict[str, Any], expected: tuple[int | None, ...]) -> None:
    assert _read(architecture, **fields).sliding_windows == expected


@pytest.mark.parametrize("name", [name for name in BASE if name != "architectures"])
def test_a_needed_field_that_is_missing(name: str) -> None:
    config = {key: value for key, value in BASE.items() if key != name}
    with pytest.raises(ModelLoadError, match=rf"model/config\.json has no '{name}'"):
        ModelConfig.from_hf(config, "model/config.json")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "64"}, "hidden_size='64' must be a whole number"),
        ({"hidden_size": 64.0}, "hidden_size=64.0 must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be a whole number of at least 1"),
        ({"vocab_size": True}, "vocab_size=True must be"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small' must be a number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' must be true or false"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must be a divisor of num_attention_heads=4"),
        ({"hidden_size": 66}, "hidden_size=66 must be a multiple of num_attention_heads=4"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>' must be a token id"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype='float8_e4m3fn' must be one of: float32, bfloat16"),
        ({"architectures": "LlamaForCausalLM"}, "must be a list of strings"),
        ({"architectures": []}, "has no 'architectures'.*LlamaForCausalLM"),
        ({"rope_scaling": [8]}, "must be an object"),
    ],
)
def test_a_field_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message) as raised:
        _read(**fields)
    assert "model/config.json" in str(raised.value)


def test_an_architecture_that_is_not_supported() -> None:
    with pytest.raises(UnsupportedModelError, match="'MambaForCausalLM' is not supported") as raised:
        _read("MambaForCausalLM")
    assert all(name in str(raised.value) for name in ("model/config.json", *SUPPORTED_ARCHITECTURES))


def test_an_activation_that_is_not_supported() -> None:
    with pytest.raises(UnsupportedModelError, match="hidden_act='gelu' is not supported; supported: silu"):
        _read(hidden_act="gelu")


@pytest.mark.parametrize("name", ["quantization_config", "compression_config"])
def test_a_quantized_checkpoint(name: str) -> None:
    with pytest.raises(UnsupportedQuantizationError, match=r"quantized with 'hqq'.*supported: awq, "):
        _read(**{name: {"quant_method": "hqq", "bits": 4}})
    scheme = _read(**{name: {"quant_method": "gptq", "bits": 4, "group_size": 128}}).quantization
    assert scheme is not None
    assert scheme.method == "gptq"
    assert _read(**{name: None}).quantization is None


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"layer_types": [FULL]}, ModelLoadError, "one type for each of the 4 layers"),
        ({"layer_types": [FULL] * 3 + ["linear_attention"]}, UnsupportedModelError, "linear_attention"),
        ({"layer_types": [SLIDING] * 4}, ModelLoadError, "use_sliding_window is false"),
        ({"use_sliding_window": True, "sliding_window": 8}, ModelLoadError, "has no 'max_window_layers'"),
        ({"use_sliding_window": True, "sliding_window": 0}, ModelLoadError, "sliding_window=0 must be"),
    ],
)
def test_windows_that_cannot_be(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _read("Qwen2ForCausalLM", **fields)


def _read_gemma3(**fields: Any) -> ModelConfig:
    return ModelConfig.from_hf({"architectures": ["Gemma3ForCausalLM"], **fields}, "model/config.json")


def test_gemma3_as_google_publishes_the_4b() -> None:
    """Most fields are left to the defaults, and the text model is one part of the config."""
    config = ModelConfig.from_hf(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "eos_token_id": [1, 106],
            "torch_dtype": "bfloat16",
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27},
        },
        "config.json",
    )
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (262_208, 2560, 34)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 256)
    assert (config.eos_token_ids, config.dtype, config.tie_word_embeddings) == (
        (1, 106),
        torch.bfloat16,
        True,
    )
    assert (config.hidden_act, config.attention_scale, config.supports_float16) == (
        "gelu_tanh",
        1 / 16,
        False,
    )
    assert [i for i, window in enumerate(config.sliding_windows) if window is None] == [5, 11, 17, 23, 29]
    assert set(config.sliding_windows) == {1024, None}
    assert (config.rope.rope_type, config.rope.rope_theta, config.rope.factor) == ("linear", 1e6, 8.0)
    assert config.local_rope is not None
    assert (config.local_rope.rope_type, config.local_rope.rope_theta) == ("default", 1e4)


def test_gemma3_ropes_old_and_new() -> None:
    old = _read_gemma3(
        rope_theta=5e5, rope_local_base_freq=20.0, rope_scaling={"rope_type": "linear", "factor": 2.0}
    )
    new = _read_gemma3(
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        }
    )
    assert (old.rope, old.local_rope) == (new.rope, new.local_rope)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"hidden_activation": "gelu"}, "gelu"),
    ],
)
def test_gemma3_options_that_are_not_supported(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        _read_gemma3(**fields)


def test_gemma3_without_a_window_for_the_layers_that_need_one() -> None:
    with pytest.raises(ModelLoadError, match="sliding_window"):
        _read_gemma3(sliding_window=None)
