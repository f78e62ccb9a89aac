"""Gemma 3: the text model alone, and the text part of the models that also see images."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from halimede.engine.config_fields import ConfigFields
from halimede.engine.layers.norm import RMSNorm
from halimede.engine.models.base import CausalLM, DecoderLayer
from halimede.engine.models.config import ArchitectureOptions, ModelConfig
from halimede.engine.models.rope_fields import read_ropes_by_layer_type
from halimede.engine.models.window_fields import windows_by_type
from halimede.errors import UnsupportedModelError

# What transformers assumes of a field that is not there; Google's config.json files leave most of them out.
_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh",
    }
)
# Fields that a config with a text_config inside has on the outside.
_OUTER = (
    "bos_token_id",
    "compression_config",
    "dtype",
    "eos_token_id",
    "quantization_config",
    "tie_word_embeddings",
    "torch_dtype",
)
_LOCAL_THETA, _GLOBAL_THETA = 10_000.0, 1_000_000.0
_NORM = re.compile(r"norm\.weight$")


class Gemma3DecoderLayer(DecoderLayer):
    """Norms before and after each half of the layer; the residual stream gets the normed outputs."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def feed_forward(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """As DecoderLayer.feed_forward."""
        attended = self.post_attention_layernorm(attended)
        normed = self.pre_feedforward_layernorm.add_for_product(attended, residual)
        output: torch.Tensor = self.post_feedforward_layernorm(self.mlp(normed))
        return output

    def prepare(self) -> None:
        """As DecoderLayer.prepare."""
        self.input_layernorm.feeds(self.self_attn.qkv_proj)
        self.pre_feedforward_layernorm.feeds(self.mlp.gate_up_proj)


class Gemma3ForCausalLM(CausalLM):
    """The shared decoder with four norms per layer, a norm over each head of q and k, a scaled embedding, and
    a sliding window with a rotary embedding of its own in most layers.

    Checkpoints hold the norms' weights less one. They are kept in float32 with the one added, where bfloat16
    would lose most of their digits.
    """

    layer_class: ClassVar[type[DecoderLayer]] = Gemma3DecoderLayer
    supports_float16: ClassVar[bool] = False

    @classmethod
    def normalize_config(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """transformers' defaults under the config; of one with a text_config, that part."""
        inner = config.get("text_config")
        if not isinstance(inner, Mapping):
            return {**_DEFAULTS, **config}
        outer = {name: config[name] for name in _OUTER if name in config}
        return {**_DEFAULTS, **outer, **inner}

    @classmethod
    def read_options(cls, fields: ConfigFields) -> ArchitectureOptions:
        """Everything by which Gemma 3 differs from Llama."""
        for name in ("final_logit_softcapping", "attn_logit_softcapping"):
            if fields.has(name):
                raise UnsupportedModelError(
                    f"{fields.source}: {name} is not supported; no published Gemma 3 has it"
                )
        if fields.flag("use_bidirectional_attention", False):
            raise UnsupportedModelError(
                f"{fields.source}: use_bidirectional_attention makes this a model that embeds text, which is "
                "not supported; use one that generates"
            )
        bias = fields.flag("attention_bias", False)
        head_dim = fields.integer("head_dim")
        rope, local_rope = read_ropes_by_layer_type(
            fields,
            head_dim,
            global_theta=_GLOBAL_THETA,
            local_theta=fields.number("rope_local_base_freq", _LOCAL_THETA),
        )
        return ArchitectureOptions(
            attention_bias=bias,
            attention_output_bias=bias,
            qk_norm=True,
            sliding_windows=_read_windows(fields),
            hidden_act=fields.text("hidden_activation"),
            rope=rope,
            local_rope=local_rope,
            attention_scale=fields.number("query_pre_attn_scalar") ** -0.5,
            embedding_scale=fields.integer("hidden_size") ** 0.5,
        )

    @property
    def float32_weights(self) -> tuple[str, ...]:
        """The norms."""
        return (_NORM.pattern,)

    def convert_weight(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A norm's weight with the one added that the checkpoint leaves out."""
        return tensor.float() + 1 if _NORM.search(name) else tensor


class Gemma3ForConditionalGeneration(Gemma3ForCausalLM):
    """Gemma 3 of 4B and more, as text only: what sees images is left out."""

    @property
    def ignored_weights(self) -> tuple[str, ...]:
        """The vision tower too."""
        return (*super().ignored_weights, r"(^|\.)(vision_tower|multi_modal_projector)\.")


def _read_windows(fields: ConfigFields) -> tuple[int | None, ...]:
    """`layer_types`, or else every sliding_window_pattern-th layer sees all and the others the window."""
    if fields.texts("layer_types"):
        return windows_by_type(fields, fields.optional_integer("sliding_window"))
    window, period = fields.integer("sliding_window"), fields.integer("sliding_window_pattern")
    return tuple(window if (i + 1) % period else None for i in range(fields.integer("num_hidden_layers")))
