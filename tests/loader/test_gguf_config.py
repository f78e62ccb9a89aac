from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import (
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    LAYERS,
    VOCAB,
    base_metadata,
    random_tensors,
    write_gguf,
)

from halimede.engine.loader.gguf import find_gguf_shards, read_gguf_config
from halimede.engine.models.config import ModelConfig
from halimede.errors import ModelLoadError, UnsupportedModelError


def read(path: Path, metadata: dict[str, Any], arch: str = "llama", **tensors: np.ndarray) -> dict[str, Any]:
    return read_gguf_config(
        [write_gguf(path, metadata, random_tensors(arch, tied=True) | tensors, arch=arch)]
    )


def test_llama(tmp_path: Path) -> None:
    config = read(tmp_path / "m.gguf", base_metadata())
    epsilon = config.pop("rms_norm_eps")
    assert epsilon == pytest.approx(1e-5)
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "vocab_size": VOCAB,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_output_bias": False,
        "mlp_bias": False,
        "dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def test_defaults(tmp_path: Path) -> None:
    metadata = base_metadata()
    for key in ("attention.head_count_kv", "rope.freq_base", "rope.dimension_count"):
        del metadata[f"llama.{key}"]
    del metadata["tokenizer.ggml.eos_token_id"]
    config = read(tmp_path / "m.gguf", metadata)
    assert config["num_key_value_heads"] == HEADS
    assert config["head_dim"] == HIDDEN // HEADS
    assert config["rope_parameters"]["rope_theta"] == 10000.0
    assert "eos_token_id" not in config


def test_output_matrix_and_biases(tmp_path: Path) -> None:
    zeros = np.zeros(HIDDEN, np.float32)
    tensors = random_tensors() | {
        "blk.0.attn_q.bias": zeros,
        "blk.0.attn_output.bias": zeros,
        "blk.0.ffn_gate.bias": zeros,
    }
    config = read_gguf_config([write_gguf(tmp_path / "m.gguf", base_metadata(), tensors)])
    assert config["tie_word_embeddings"] is False
    assert config["attention_bias"] is True
    assert config["attention_output_bias"] is True
    assert config["mlp_bias"] is True


def test_mistral_with_sliding_window(tmp_path: Path) -> None:
    config = read(tmp_path / "m.gguf", base_metadata() | {"llama.attention.sliding_window": 128})
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["model_type"] == "mistral"
    assert config["sliding_window"] == 128
    assert ModelConfig.from_hf(config, "m.gguf").sliding_windows == (128,) * LAYERS


def test_head_size_that_does_not_follow_from_the_width(tmp_path: Path) -> None:
    metadata = base_metadata() | {
        f"llama.{x}": 32 for x in ("attention.key_length", "attention.value_length")
    }
    config = read(tmp_path / "m.gguf", metadata | {"llama.rope.dimension_count": 32})
    assert config["head_dim"] == 32


def test_llama_3_1_rope_factors(tmp_path: Path) -> None:
    factors = np.array([1.0, 1.5, 8.0, 8.0, 1, 1, 1, 1], np.float32)
    config = read(tmp_path / "m.gguf", base_metadata(), **{"rope_freqs.weight": factors})
    assert config["rope_parameters"] == {
        "rope_theta": 500000.0,
        "rope_type": "factors",
        "factors": factors.tolist(),
    }
    metadata = base_metadata() | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    with pytest.raises(UnsupportedModelError, match=r"linear.*rope_freqs"):
        read(tmp_path / "both.gguf", metadata, **{"rope_freqs.weight": factors})


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"type": "none", "factor": 4.0}, {"rope_type": "default"}),
        ({"type": "linear", "factor": 1.0}, {"rope_type": "default"}),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 128},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        (
            {
                "type": "yarn",
                "factor": 2.0,
                "yarn_beta_fast": 16.0,
                "yarn_beta_slow": 2.0,
                "attn_factor": 0.5,
            },
            {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 512,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "attention_factor": pytest.approx(0.5 * (0.1 * 0.693147 + 1)),
            },
        ),
    ],
)
def test_rope_scaling(tmp_path: Path, metadata: dict[str, Any], expected: dict[str, Any]) -> None:
    metadata = {f"llama.rope.scaling.{key}": value for key, value in metadata.items()}
    config = read(tmp_path / "m.gguf", base_metadata() | metadata)
    assert config["rope_parameters"] == {"rope_theta": 500000.0} | expected


def test_old_key_for_linear_scaling(tmp_path: Path) -> None:
    config = read(tmp_path / "m.gguf", base_metadata() | {"llama.rope.scale_linear": 8.0})
    assert config["rope_parameters"] == {"rope_theta": 500000.0, "rope_type": "linear", "factor": 8.0}


def test_qwen(tmp_path: Path) -> None:
    config = read(tmp_path / "2.gguf", base_metadata("qwen2"), "qwen2")
    assert (config["architectures"], config["model_type"]) == (["Qwen2ForCausalLM"], "qwen2")
    assert (config["attention_bias"], config["attention_output_bias"]) == (True, False)
    config = read(tmp_path / "3.gguf", base_metadata("qwen3"), "qwen3")
    assert (config["architectures"], config["model_type"]) == (["Qwen3ForCausalLM"], "qwen3")
    assert config["attention_bias"] is False


@pytest.mark.parametrize(
    ("added", "eos"),
    [
        ({}, 2),
        ({"tokenizer.ggml.eot_token_id": 5}, [2, 5]),
        ({"tokenizer.ggml.eot_token_id": 2}, 2),
        ({"types": [1, 3, 3, 3, 1]}, [2, 3]),
        ({"types": [1, 3, 3, 1, 1]}, 2),
        ({"types": [1, 3, 3, 3, 1], "tokenizer.ggml.eot_token_id": 1}, [2, 1]),
    ],
)
def test_tokens_that_end_a_text(tmp_path: Path, added: dict[str, Any], eos: int | list[int]) -> None:
    metadata = base_metadata() | {"tokenizer.ggml.padding_token_id": 4} | added
    if (types := metadata.pop("types", None)) is not None:
        metadata["tokenizer.ggml.token_type"] = types
        metadata["tokenizer.ggml.tokens"] = ["a", "<s>", "</s>", "<|eot_id|>", "b"]
    config = read(tmp_path / "m.gguf", metadata)
    assert config["eos_token_id"] == eos
    assert config["pad_token_id"] == 4


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16"), ("Q4_0", "bfloat16")]
)
def test_dtype(tmp_path: Path, kind: str, dtype: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    tensors = random_tensors()
    types = {name: number for name, data in tensors.items() if data.ndim > 1}
    tensors |= {name: gguf.quants.quantize(tensors[name], number) for name in types}
    config = read_gguf_config([write_gguf(tmp_path / "m.gguf", base_metadata(), tensors, types=types)])
    assert config["dtype"] == dtype
    assert config["vocab_size"] == VOCAB


def test_numbers_per_layer(tmp_path: Path) -> None:
    same = {"llama.attention.head_count": [4, 4], "llama.attention.head_count_kv": [2, 2]}
    config = read(tmp_path / "m.gguf", base_metadata() | same)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        with pytest.raises(UnsupportedModelError, match=rf"llama\.{key} differs between layers: \[4, 2\]"):
            read(tmp_path / "m.gguf", base_metadata() | {f"llama.{key}": [4, 2]})


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"llama.expert_count": 8}, r"llama\.expert_count = 8 is not supported"),
        ({"llama.logit_scale": 0.5}, r"llama\.logit_scale = 0\.5"),
        ({"llama.attention.value_length": 8}, r"value_length = 8 differs from the head size 16"),
        ({"llama.attention.key_length": 32}, r"rope\.dimension_count = 16 differs from the head size 32"),
        ({"llama.rope.scaling.type": "longrope"}, r"'longrope' is not supported; known: linear, yarn"),
        ({"general.type": "adapter"}, r"holds a adapter, not a model"),
    ],
)
def test_unsupported_options(tmp_path: Path, added: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"m\.gguf.*{message}"):
        read(tmp_path / "m.gguf", base_metadata() | added)


def test_unsupported_architecture(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {}, arch="mamba")
    with pytest.raises(UnsupportedModelError, match=r"m\.gguf.*'mamba'.*supported: llama, qwen2, qwen3"):
        read_gguf_config([path])


@pytest.mark.parametrize(
    "key",
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ],
)
def test_missing_and_mistyped_keys(tmp_path: Path, key: str) -> None:
    metadata = base_metadata()
    del metadata[f"llama.{key}"]
    with pytest.raises(ModelLoadError, match=rf"m\.gguf has no llama\.{key}"):
        read(tmp_path / "m.gguf", metadata)
    with pytest.raises(ModelLoadError, match=rf"m\.gguf: llama\.{key} is 'many', but should be"):
        read(tmp_path / "m.gguf", metadata | {f"llama.{key}": "many"})


def test_missing_architecture_and_embedding(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"m\.gguf has no general\.architecture"):
        read_gguf_config([write_gguf(tmp_path / "m.gguf", {}, arch=None)])
    with pytest.raises(ModelLoadError, match=r"m\.gguf has no tensor token_embd\.weight"):
        read_gguf_config([write_gguf(tmp_path / "m.gguf", base_metadata())])


def test_shards(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", base_metadata(), random_tensors(), split_max_tensors=5)
    config = read_gguf_config(find_gguf_shards(tmp_path / "m-00001-of-00005.gguf"))
    assert config["tie_word_embeddings"] is False
    with pytest.raises(ModelLoadError, match=r"m-00002-of-00005\.gguf is one of 5 shards, but 1 were given"):
        read_gguf_config([tmp_path / "m-00002-of-00005.gguf"])


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_both_readers_of_such_a_config_take_it(tmp_path: Path, arch: str) -> None:
    from transformers import AutoConfig

    factors = {"rope_freqs.weight": np.ones(HIDDEN // HEADS // 2, np.float32)}
    ours = ModelConfig.from_hf(read(tmp_path / "f.gguf", base_metadata(arch), arch, **factors), "f.gguf")
    assert (ours.num_key_value_heads, ours.head_dim) == (KV_HEADS, HIDDEN // HEADS)
    assert ours.rope.factors == (1.0,) * 8
    assert (ours.attention_bias, ours.qk_norm) == (arch == "qwen2", arch == "qwen3")
    config = read(tmp_path / "m.gguf", base_metadata(arch), arch)
    found = AutoConfig.for_model(**config)
    assert found.num_key_value_heads == KV_HEADS
    assert found.rope_parameters["rope_theta"] == 500000.0
    assert found.tie_word_embeddings is True


def test_real_file(smollm2_gguf: Path) -> None:
    config = read_gguf_config([smollm2_gguf])
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["hidden_size"], config["num_hidden_layers"], config["head_dim"]) == (576, 30, 64)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (9, 3)
    assert (config["vocab_size"], config["max_position_embeddings"]) == (49152, 8192)
    assert (config["eos_token_id"], config["tie_word_embeddings"]) == (2, True)


def _gemma3(tmp_path: Path, **metadata: Any) -> dict[str, Any]:
    base = base_metadata("gemma3") | {"gemma3.attention.sliding_window": 16, "gemma3.block_count": 7}
    return read(tmp_path / "m.gguf", base | metadata, "gemma3")


def test_gemma3_has_what_a_gguf_leaves_out(tmp_path: Path) -> None:
    config = _gemma3(tmp_path)
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    slides, sees_all = "sliding_attention", "full_attention"
    assert config["layer_types"] == [slides] * 5 + [sees_all, slides]
    assert config["rope_parameters"] == {
        "full_attention": {"rope_type": "default", "rope_theta": 500000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    assert config["query_pre_attn_scalar"] == HIDDEN // HEADS
    assert ModelConfig.from_hf(config, "m.gguf").sliding_windows == (16,) * 5 + (None, 16)
    metadata = base_metadata("gemma3")
    del metadata["gemma3.rope.freq_base"]
    rope = read(tmp_path / "bare.gguf", metadata, "gemma3")["rope_parameters"]
    assert rope["full_attention"]["rope_theta"] == 1e6


def test_gemma3_scaling_is_of_the_layers_that_see_everything(tmp_path: Path) -> None:
    scaling = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    config = ModelConfig.from_hf(_gemma3(tmp_path, **scaling), "m.gguf")
    assert (config.rope.rope_type, config.rope.factor) == ("linear", 8.0)
    assert config.local_rope is not None
    assert config.local_rope.rope_type == "default"


def test_gemma3_without_a_window(tmp_path: Path) -> None:
    config = _gemma3(tmp_path, **{"gemma3.attention.sliding_window": 0})
    assert ModelConfig.from_hf(config, "m.gguf").sliding_windows == (None,) * 7


def test_the_27b_of_gemma3_scales_attention_in_its_own_way(tmp_path: Path) -> None:
    metadata = {"gemma3.block_count": 62, "gemma3.attention.key_length": 32}
    metadata |= {"gemma3.attention.value_length": 32, "gemma3.rope.dimension_count": 32}
    assert _gemma3(tmp_path, **metadata)["query_pre_attn_scalar"] == HIDDEN // HEADS


def test_gemma_with_soft_caps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="final_logit_softcapping = 30"):
        _gemma3(tmp_path, **{"gemma3.final_logit_softcapping": 30.0})
