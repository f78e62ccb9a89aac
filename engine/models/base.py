"""The decoder that every dense architecture shares; a family's file says only where it differs."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn

from halimede.engine.config_fields import ConfigFields
from halimede.engine.layers.attention import SelfAttention
from halimede.engine.layers.attention_step import AttentionStep, Backend, LayerGroup
from halimede.engine.layers.attention_torch import TorchBackend
from halimede.engine.layers.embedding import Embedding
from halimede.engine.layers.linear import Linear
from halimede.engine.layers.mlp import GatedMLP
from halimede.engine.layers.norm import RMSNorm
from halimede.engine.layers.rotary import RotaryEmbedding
from halimede.engine.model_input import KVCache, ModelInput
from halimede.engine.models.config import ArchitectureOptions, ModelConfig
from halimede.engine.models.layer_trace import LayerTraces, can_replay, run_layers


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            bias=config.attention_bias,
            output_bias=config.attention_output_bias,
            qk_norm_eps=config.rms_norm_eps if config.qk_norm else None,
            scale=config.attention_scale,
        )
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            bias=config.mlp_bias,
            activation=config.hidden_act,
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor | None,
        residual: torch.Tensor,
        step: AttentionStep,
        kv_cache: KVCache,
    ) -> torch.Tensor:
        """One layer; `residual` (T, hidden) is updated in place.

        hidden_states (T, hidden): the last layer's output, not yet in the residual; None for the first.
        Returns this layer's output, for the next norm to add.
        """
        attended = self.attend(hidden_states, residual, step, kv_cache)
        return self.feed_forward(attended, residual)

    def attend(
        self,
        hidden_states: torch.Tensor | None,
        residual: torch.Tensor,
        step: AttentionStep,
        kv_cache: KVCache,
    ) -> torch.Tensor:
        """The first half of `forward`: (T, hidden), or (S, hidden) of a step for outputs only."""
        norm = self.input_layernorm
        if hidden_states is None:
            normed = norm.for_product(residual)
        else:
            normed = norm.add_for_product(hidden_states, residual)
        attended: torch.Tensor = self.self_attn(normed, step, kv_cache)
        return attended

    def feed_forward(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The second half: adds `attended` (T, hidden) to the residual, returns the layer's output."""
        normed = self.post_attention_layernorm.add_for_product(attended, residual)
        output: torch.Tensor = self.mlp(normed)
        return output

    def prepare(self) -> None:
        """Tell the norms before products which those are. The norms and the products are prepared."""
        self.input_layernorm.feeds(self.self_attn.qkv_proj)
        self.post_attention_layernorm.feeds(self.mlp.gate_up_proj)


class Decoder(nn.Module):
    """Embedding, layers and final norm: token ids to hidden states."""

    def __init__(self, config: ModelConfig, layer_class: type[DecoderLayer] = DecoderLayer) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, config.embedding_scale)
        self.layers = nn.ModuleList(layer_class(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.rope)
        self.rotary_emb_local = None if config.local_rope is None else RotaryEmbedding(config.local_rope)
        # What layers share in a step hangs on their window: the groups, and which one each layer is in.
        windows = list(dict.fromkeys(config.sliding_windows))
        self._groups = [LayerGroup(window, self._rotary_of(window)) for window in windows]
        self._group_of_layer = [windows.index(window) for window in config.sliding_windows]
        self._backend: Backend = TorchBackend()
        self._traces: LayerTraces | None = None

    def _rotary_of(self, window: int | None) -> RotaryEmbedding:
        local = self.rotary_emb_local
        return self.rotary_emb if window is None or local is None else local

    def prepare(self, device: torch.device, max_model_len: int, backend: Backend) -> None:
        """Build the tables of the rotary embeddings for positions < max_model_len, and prepare the layers.

        What layers consist of is prepared.
        """
        self._backend = backend
        for layer in self.layers:
            layer.prepare()  # type: ignore[operator]  # nn.Module.__getattr__ says Tensor
        recorded = device.type == "cpu" and isinstance(backend, TorchBackend)
        self._traces = LayerTraces(self.layers, self._group_of_layer) if recorded else None
        for rotary_emb in (self.rotary_emb, self.rotary_emb_local):
            if rotary_emb is not None:
                rotary_emb.prepare(device, max_model_len)

    def forward(self, model_input: ModelInput, kv_caches: Sequence[KVCache]) -> torch.Tensor:
        """One step: (T) tokens to (T, hidden), or (S, hidden) of the model_input's outputs.

        kv_caches: one per layer, read and written.
        """
        residual: torch.Tensor = self.embed_tokens(model_input.input_ids)
        if residual.shape[0] == 0:
            return residual
        heads = self.config.num_attention_heads
        steps = self._backend.make_steps(model_input, self._groups, kv_caches[0], heads)
        hidden_states: torch.Tensor | None
        if self._traces is not None and can_replay(steps):
            nothing = torch.zeros_like(residual)  # recorded layers all begin alike: something to add
            hidden_states = self._traces.run(nothing, residual, steps, kv_caches)
        else:
            whole = len(self.layers) - (model_input.outputs is not None)  # layers that run for all tokens
            chosen = [steps[group] for group in self._group_of_layer[:whole]]
            hidden_states = run_layers(self.layers, None, residual, chosen, kv_caches)
            if model_input.outputs is not None:
                last = steps[self._group_of_layer[-1]]
                return self._finish(hidden_states, residual, last, model_input, kv_caches[-1])
        assert hidden_states is not None, "a decoder has layers"
        normed = self.norm.add(hidden_states, residual)
        return normed if model_input.outputs is None else normed.index_select(0, model_input.logits_indices)

    def _finish(
        self,
        hidden_states: torch.Tensor | None,
        residual: torch.Tensor,
        step: AttentionStep,
        model_input: ModelInput,
        kv_cache: KVCache,
    ) -> torch.Tensor:
        """The last layer and the norm for the tokens that are sampled from: (S, hidden).

        Of a prompt's other tokens only keys and values are needed: most of a layer's work is saved.
        """
        layer: DecoderLayer = self.layers[-1]  # type: ignore[assignment]
        group, heads = self._groups[self._group_of_layer[-1]], self.config.num_attention_heads
        step = self._backend.make_output_step(step, model_input, group, kv_cache, heads)
        attended = layer.attend(hidden_states, residual, step, kv_cache)
        if attended.shape[0] == 0:
            return attended
        residual = residual.index_select(0, model_input.logits_indices)
        return self.norm.add(layer.feed_forward(attended, residual), residual)


class CausalLM(nn.Module):
    """A language model: Decoder and the projection to the vocabulary. Parameters have Hugging Face's names.

    packed_modules: a fused module to the checkpoint's modules whose rows it joins, in order.
    layer_class: what the decoder is a stack of. supports_float16: False where activations pass 65504.
    config: what it was built from.

    To use one: build_model (parameters on the meta device), load_weights, prepare, then forward.
    """

    packed_modules: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    )
    layer_class: ClassVar[type[DecoderLayer]] = DecoderLayer
    supports_float16: ClassVar[bool] = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, self.layer_class)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def normalize_config(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The config.json in the form of a plain text model's, with this architecture's own defaults."""
        return config

    @classmethod
    def read_options(cls, fields: ConfigFields) -> ArchitectureOptions:
        """What this architecture takes from config.json beyond the fields that all have."""
        return ArchitectureOptions()

    @property
    def ignored_weights(self) -> tuple[str, ...]:
        """Regular expressions of checkpoint tensors that are rightly not loaded."""
        return (r"rotary_emb\.inv_freq$",)  # old checkpoints stored what the config already says

    @property
    def float32_weights(self) -> tuple[str, ...]:
        """Regular expressions of parameters that stay in float32, whatever the model's dtype."""
        return ()

    def convert_weight(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What parameter `name` (or its part) is filled with, from the checkpoint's tensor."""
        return tensor

    def prepare(
        self,
        device: torch.device,
        dtype: torch.dtype,
        max_model_len: int,
        *,
        twice: bool = True,
        backend: Backend | None = None,
    ) -> None:
        """Build what is computed, not loaded: tables for positions < max_model_len, the layouts of weights.

        Call after loading. dtype: of activations, the weights' or wider. twice: see Linear.prepare. backend:
        how the forward pass is run, None is torch's operations.
        """
        backend = backend or TorchBackend()
        for module in self.modules():
            if isinstance(module, Linear):
                tied = module is self.lm_head and self.config.tie_word_embeddings
                module.prepare(dtype, twice=twice, shared=tied)
            elif isinstance(module, Embedding | RMSNorm):
                module.prepare(dtype, backend.ops)
            elif isinstance(module, GatedMLP):
                module.prepare(backend.ops)
        self.model.prepare(device, max_model_len, backend)

    @property
    def kv_scales(self) -> list[tuple[float, float]]:
        """What keys and values of each layer are divided by in an 8-bit KV cache, as the checkpoint says."""
        attentions = (module for module in self.modules() if isinstance(module, SelfAttention))
        return [(attention.k_scale, attention.v_scale) for attention in attentions]

    def second_form_bytes(self, dtype: torch.dtype) -> int:
        """What keeping weights in two forms costs a CPU, with activations of `dtype`."""
        linears = (module for module in self.modules() if isinstance(module, Linear))
        sizes = (linear.weight.numel() for linear in linears if linear.weight.dtype.itemsize == 2)
        return sum(sizes) * dtype.itemsize

    def forward(self, model_input: ModelInput, kv_caches: Sequence[KVCache]) -> torch.Tensor:
        """One step: hidden states (T, hidden) of its tokens, or (S, hidden) of its outputs.

        The tokens' keys and values go to kv_caches.
        """
        hidden_states: torch.Tensor = self.model(model_input, kv_caches)
        return hidden_states

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(L, hidden) -> (L, V), of the activations' dtype."""
        logits: torch.Tensor = self.lm_head(hidden_states)
        return logits
