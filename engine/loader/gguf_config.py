"""A Hugging Face config.json, made from the metadata and tensor list of a GGUF.

The metadata keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halimede.engine.loader.gguf_file import GgufFile, need_for_all_layers, open_gguf_shards
from halimede.engine.loader.gguf_names import hf_names
from halimede.engine.quant.gguf_types import KEPT_TYPES
from halimede.errors import ModelLoadError, UnsupportedModelError

if TYPE_CHECKING:
    from gguf.gguf_reader import ReaderTensor

# GGUF's name -> Hugging Face's model_type and class. Mistral, Yi, SmolLM2 and more are "llama" in GGUF.
GGUF_ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}

# What a scalar of this name would change in the forward pass if it were anything else.
_NEUTRAL = {
    "expert_count": 0.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "attention.clamp_kqv": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
}

# What a GGUF of Gemma 3 leaves to whoever runs it (transformers' Gemma3TextConfig and the published models).
_GEMMA3_LOCAL_THETA, _GEMMA3_GLOBAL_THETA = 10000.0, 1000000.0
_GEMMA3_PATTERN = 6
_GEMMA3_27B_LAYERS = 62

# Tokens that end a turn in a chat, for files that do not name theirs (the ones llama.cpp looks for).
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>")
_CONTROL = 3


def read_gguf_config(paths: Sequence[Path]) -> dict[str, Any]:
    """The configuration in the form of a Hugging Face config.json; `paths` are the model's shards in order.

    Beside the Hugging Face fields it has `attention_output_bias` (o_proj has a bias), a `quantization_config`
    of quant_method "gguf" with the type of each module that stays quantized, and `rope_parameters`
    may be {"rope_type": "factors", "factors": [...]}: inverse frequency i is divided by factors[i] (Llama 3.1
    and later).

    Raises UnsupportedModelError for an architecture or an option of it that is not implemented and
    ModelLoadError for a key that is missing or wrong and for unreadable files.
    """
    files = open_gguf_shards(paths)
    meta = files[0]
    arch = meta.need("general.architecture", str)
    _check_supported(meta, arch)
    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    model_type, class_name = GGUF_ARCHITECTURES[arch]
    # Not for Qwen: which of its layers have the window is nowhere in a GGUF, and no Qwen file has the key.
    sliding_window = meta.find("llama.attention.sliding_window", int)
    if sliding_window:
        model_type, class_name = "mistral", "MistralForCausalLM"
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        **_sizes(meta, arch),
        "rms_norm_eps": meta.need(f"{arch}.attention.layer_norm_rms_epsilon", float),
        "rope_parameters": _rope_parameters(meta, arch, tensors.get("rope_freqs.weight")),
        "vocab_size": _vocab_size(meta, tensors),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "attention_output_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "dtype": _dtype(tensors),
        **_token_ids(meta),
    }
    types = _quantized_modules(meta, arch, tensors)
    if types:
        config["quantization_config"] = {"quant_method": "gguf", "types": types}
    if sliding_window:
        config["sliding_window"] = sliding_window
    if arch == "gemma3":
        config |= _gemma3(meta, config)
    _check_head_dim(meta, arch, config["head_dim"])
    return config


def _quantized_modules(meta: GgufFile, arch: str, tensors: "dict[str, ReaderTensor]") -> dict[str, str]:
    """The type of each module whose weight stays quantized, by its Hugging Face name."""
    names = hf_names(arch, meta.need(f"{arch}.block_count", int), meta.path)
    return {
        names[name].removesuffix(".weight"): tensor.tensor_type.name
        for name, tensor in tensors.items()
        if name in names and name.endswith(".weight") and tensor.tensor_type.name in KEPT_TYPES
    }


def _check_supported(meta: GgufFile, arch: str) -> None:
    if meta.find("general.type", str) not in (None, "model"):
        raise UnsupportedModelError(
            f"{meta.path} holds a {meta.find('general.type', str)}, not a model; give the model's own GGUF"
        )
    if arch not in GGUF_ARCHITECTURES:
        raise UnsupportedModelError(
            f"{meta.path}: architecture {arch!r} is not supported in GGUF; "
            f"supported: {', '.join(GGUF_ARCHITECTURES)}"
        )
    for name, neutral in _NEUTRAL.items():
        value = meta.find(f"{arch}.{name}", float)
        if value is not None and value != neutral:
            raise UnsupportedModelError(
                f"{meta.path}: {arch}.{name} = {value:g} is not supported; use another model"
            )


def _sizes(meta: GgufFile, arch: str) -> dict[str, int]:
    hidden_size = meta.need(f"{arch}.embedding_length", int)
    heads = need_for_all_layers(meta, f"{arch}.attention.head_count")
    kv_heads = heads
    if f"{arch}.attention.head_count_kv" in meta:
        kv_heads = need_for_all_layers(meta, f"{arch}.attention.head_count_kv")
    head_dim = meta.find(f"{arch}.attention.key_length", int)
    if head_dim is None:
        head_dim = meta.find(f"{arch}.rope.dimension_count", int) or hidden_size // max(heads, 1)
    return {
        "hidden_size": hidden_size,
        "intermediate_size": need_for_all_layers(meta, f"{arch}.feed_forward_length"),
        "num_hidden_layers": meta.need(f"{arch}.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": meta.need(f"{arch}.context_length", int),
    }


def _check_head_dim(meta: GgufFile, arch: str, head_dim: int) -> None:
    """Raise UnsupportedModelError where values or rotation do not cover the whole head."""
    for name in ("attention.value_length", "rope.dimension_count"):
        value = meta.find(f"{arch}.{name}", int)
        if value is not None and value != head_dim:
            raise UnsupportedModelError(
                f"{meta.path}: {arch}.{name} = {value} differs from the head size {head_dim}, "
                "which is not supported; use another model"
            )


def _rope_parameters(meta: GgufFile, arch: str, factors: "ReaderTensor | None") -> dict[str, Any]:
    theta = meta.find(f"{arch}.rope.freq_base", float)
    if theta is None:
        theta = _GEMMA3_GLOBAL_THETA if arch == "gemma3" else 10000.0
    result: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    scaling = f"{arch}.rope.scaling"
    kind = meta.find(f"{scaling}.type", str) or "linear"
    factor = meta.find(f"{scaling}.factor", float) or meta.find(f"{arch}.rope.scale_linear", float) or 1.0
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(
            f"{meta.path}: {scaling}.type {kind!r} is not supported; known: linear, yarn"
        )
    scaled = kind != "none" and factor != 1.0
    if factors is not None:
        if scaled:
            raise UnsupportedModelError(
                f"{meta.path}: {scaling}.type {kind!r} together with rope_freqs.weight is not supported"
            )
        return result | {"rope_type": "factors", "factors": [float(x) for x in factors.data.tolist()]}
    if scaled:
        result |= {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            result |= _yarn(meta, arch, factor)
    return result


def _yarn(meta: GgufFile, arch: str, factor: float) -> dict[str, Any]:
    scaling = f"{arch}.rope.scaling"
    original = meta.find(f"{scaling}.original_context_length", int)
    result: dict[str, Any] = {
        "original_max_position_embeddings": original or meta.need(f"{arch}.context_length", int)
    }
    for name in ("beta_fast", "beta_slow"):
        value = meta.find(f"{scaling}.yarn_{name}", float)
        if value is not None:
            result[name] = value
    attention = meta.find(f"{scaling}.attn_factor", float)
    if attention not in (None, 1.0):
        # GGUF's factor comes on top of YaRN's own; Hugging Face's replaces it.
        result["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return result


def _gemma3(meta: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """The fields that only Gemma 3 has; `config` has the others."""
    window = meta.find("gemma3.attention.sliding_window", int)
    local_theta = meta.find("gemma3.rope.freq_base_swa", float) or _GEMMA3_LOCAL_THETA
    layers = config["num_hidden_layers"]
    scalar = config["head_dim"]
    if layers == _GEMMA3_27B_LAYERS:  # the one size whose attention is not scaled by its head
        scalar = config["hidden_size"] // config["num_attention_heads"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": window or None,
        "layer_types": [
            "sliding_attention" if window and slides else "full_attention"
            for slides in _gemma3_pattern(meta, layers)
        ],
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
        },
    }


def _gemma3_pattern(meta: GgufFile, layers: int) -> list[bool]:
    """Whether each layer has the window: listed in the file, or all but every n-th."""
    key = "gemma3.attention.sliding_window_pattern"
    if meta.is_array(key):
        listed = meta.find_array(key, bool) or []
        if len(listed) != layers:
            raise ModelLoadError(
                f"{meta.path}: {key} has {len(listed)} entries for {layers} layers; convert the model again"
            )
        return listed
    period = meta.find(key, int) or _GEMMA3_PATTERN
    return [bool((layer + 1) % period) for layer in range(layers)]


def _vocab_size(meta: GgufFile, tensors: "dict[str, ReaderTensor]") -> int:
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelLoadError(f"{meta.path} has no tensor token_embd.weight; download all of its files again")
    return int(embedding.shape[1])


def _dtype(tensors: "dict[str, ReaderTensor]") -> str:
    """The type to run in: the matrices' own; bfloat16, whose range suits every model, if quantized."""
    kinds = {tensor.tensor_type.name for tensor in tensors.values() if len(tensor.shape) > 1}
    if kinds == {"F32"}:
        return "float32"
    return "float16" if kinds <= {"F16", "F32"} else "bfloat16"


def _token_ids(meta: GgufFile) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("pad", "padding")):
        token_id = meta.find(f"tokenizer.ggml.{key}_token_id", int)
        if token_id is not None:
            result[f"{name}_token_id"] = token_id
    eos = meta.find("tokenizer.ggml.eos_token_id", int)
    turn_end = meta.find("tokenizer.ggml.eot_token_id", int)
    ends = [eos, turn_end] if turn_end is not None else [eos, *_find_turn_ends(meta)]
    unique = list(dict.fromkeys(end for end in ends if end is not None))
    if unique:
        result["eos_token_id"] = unique[0] if len(unique) == 1 else unique
    return result


def _find_turn_ends(meta: GgufFile) -> list[int]:
    tokens = meta.find_array("tokenizer.ggml.tokens", str) or []
    types = meta.find_array("tokenizer.ggml.token_type", int) or []
    return [i for i, token in enumerate(tokens[: len(types)]) if types[i] == _CONTROL and token in _TURN_ENDS]
