"""The one form in which the engine knows a model, whatever its checkpoint's config looked like."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from halimede.engine.config_fields import ConfigFields
from halimede.engine.layers.rope_config import RopeConfig
from halimede.engine.models.registry import SUPPORTED_ARCHITECTURES, model_class
from halimede.engine.models.rope_fields import read_rope
from halimede.engine.quant.registry import read_scheme
from halimede.engine.quant.scheme import QuantScheme
from halimede.errors import ModelLoadError, UnsupportedModelError
from halimede.kernels.ops import Gate

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ACTIVATIONS: Mapping[str, Gate] = MappingProxyType(
    {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
)


@dataclass(frozen=True, slots=True)
class ArchitectureOptions:
    """What an architecture adds to the shared decoder, as its class reads it from the config.

    attention_bias: on q_proj, k_proj, v_proj. attention_output_bias: on o_proj.
    mlp_bias: on gate_proj, up_proj, down_proj. qk_norm: RMSNorm over each head of q and k.
    sliding_windows: per layer, how many tokens a token sees, itself included; None is all of them. Empty: no
        layer has a window.
    hidden_act: the activation as Hugging Face names it; None is the field hidden_act.
    rope: the rotary embedding; None is what read_rope makes of the config. local_rope: that of the layers
        with a window, None if it is the same.
    attention_scale: what q k^T is multiplied by; None is head_dim^-0.5.
    embedding_scale: what the token embedding is multiplied by.
    """

    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    hidden_act: str | None = None
    rope: RopeConfig | None = None
    local_rope: RopeConfig | None = None
    attention_scale: float | None = None
    embedding_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model's shape and options. The options are those of ArchitectureOptions.

    sliding_windows has one entry per layer. supports_float16: False where activations pass 65504.
    dtype: the checkpoint's, None when it does not say.
    bos_token_ids, eos_token_ids: empty when the config names none.
    quantization: how the weights are quantized, None where they are not.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    hidden_act: Gate
    rope: RopeConfig
    local_rope: RopeConfig | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    attention_scale: float
    embedding_scale: float
    supports_float16: bool
    bos_token_ids: tuple[int, ...]
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype | None
    quantization: QuantScheme | None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], source: str) -> "ModelConfig":
        """Read a Hugging Face config, of transformers 5 or older; `source` names its file in errors.

        Raises ModelLoadError for a field that is missing or wrong, UnsupportedModelError for the
        architecture, rope type or activation, UnsupportedQuantizationError for how it is quantized.
        """
        architecture = _read_architecture(ConfigFields(config, source))
        family = model_class(architecture)
        fields = ConfigFields(family.normalize_config(config), source)
        heads = fields.integer("num_attention_heads")
        kv_heads = fields.integer("num_key_value_heads", heads)
        hidden_size = fields.integer("hidden_size")
        num_layers = fields.integer("num_hidden_layers")
        if heads % kv_heads:
            must = f"a divisor of num_attention_heads={heads}"
            raise fields.wrong("num_key_value_heads", kv_heads, must)
        if not fields.has("head_dim") and hidden_size % heads:
            raise fields.wrong("hidden_size", hidden_size, f"a multiple of num_attention_heads={heads}")
        head_dim = fields.integer("head_dim", max(1, hidden_size // heads))
        options = family.read_options(fields)
        return cls(
            architecture=architecture,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps"),
            hidden_act=_read_activation(fields, options.hidden_act),
            rope=options.rope or read_rope(fields, head_dim),
            local_rope=options.local_rope,
            max_position_embeddings=fields.integer("max_position_embeddings"),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            attention_bias=options.attention_bias,
            attention_output_bias=options.attention_output_bias,
            mlp_bias=options.mlp_bias,
            qk_norm=options.qk_norm,
            sliding_windows=options.sliding_windows or (None,) * num_layers,
            attention_scale=options.attention_scale or head_dim**-0.5,
            embedding_scale=options.embedding_scale,
            supports_float16=family.supports_float16,
            bos_token_ids=fields.token_ids("bos_token_id"),
            eos_token_ids=fields.token_ids("eos_token_id"),
            dtype=_read_dtype(fields),
            quantization=read_scheme(fields),
        )


def _read_architecture(fields: ConfigFields) -> str:
    names = fields.texts("architectures")
    if not names:
        raise ModelLoadError(
            f"{fields.source} has no 'architectures', so the kind of model is unknown; "
            f"add one of: {', '.join(sorted(SUPPORTED_ARCHITECTURES))}"
        )
    try:
        model_class(names[0])
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{fields.source}: {error}") from None
    return names[0]


def _read_activation(fields: ConfigFields, name: str | None) -> Gate:
    name = name or fields.text("hidden_act", "silu")
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"{fields.source}: hidden_act={name!r} is not supported; supported: {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _read_dtype(fields: ConfigFields) -> torch.dtype | None:
    field = "dtype" if fields.has("dtype") else "torch_dtype"
    if not fields.has(field):
        return None
    name = fields.text(field).removeprefix("torch.")
    if name not in _DTYPES:
        raise fields.wrong(field, name, f"one of: {', '.join(_DTYPES)}")
    return _DTYPES[name]
