"""The decoder that every dense architecture shares; a family's file says only where it differs."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from halimede.engine.layers.attention import SelfAttention
from halimede.engine.layers.embedding import Embedding
from halimede.engine.layers.linear import Linear
from halimede.engine.layers.mlp import GatedMLP
from halimede.engine.layers.norm import RMSNorm
from halimede.engine.layers.rotary import CosSin, RotaryEmbedding
from halimede.engine.model_input import AttentionMetadata, KVCache, ModelInput
from halimede.engine.models.config import ArchitectureOptions, ModelConfig
from halimede.engine.models.config_fields import ConfigFields
from halimede.kernels.attention_plan import AttentionPlan, plan_attention


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
        )
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor | None,
        residual: torch.Tensor,
        rope: CosSin,
        kv_cache: KVCache,
        slot_mapping: torch.Tensor,
        plan: AttentionPlan,
    ) -> torch.Tensor:
        """One layer; `residual` (T, hidden) is updated in place.

        hidden_states (T, hidden): the last layer's output, not yet in the residual; None for the first.
        Returns this layer's output, for the next norm to add.
        """
        norm = self.input_layernorm
        hidden_states = norm(residual) if hidden_states is None else norm.add(hidden_states, residual)
        hidden_states = self.self_attn(hidden_states, rope, kv_cache, slot_mapping, plan)
        hidden_states = self.post_attention_layernorm.add(hidden_states, residual)
        output: torch.Tensor = self.mlp(hidden_states)
        return output


class Decoder(nn.Module):
    """Embedding, layers and final norm: token ids to hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.rope)

    def forward(self, model_input: ModelInput, kv_caches: Sequence[KVCache]) -> torch.Tensor:
        """One step: (T) tokens to (T, hidden). kv_caches: one per layer, read and written."""
        residual: torch.Tensor = self.embed_tokens(model_input.input_ids)
        if residual.shape[0] == 0:
            return residual
        rope = self.rotary_emb(model_input.positions)
        windows = self.config.sliding_windows
        plans = {window: _plan(model_input.attn, kv_caches[0], window) for window in set(windows)}
        slot_mapping = model_input.attn.slot_mapping
        hidden_states: torch.Tensor | None = None
        for layer, kv_cache, window in zip(self.layers, kv_caches, windows, strict=True):
            hidden_states = layer(hidden_states, residual, rope, kv_cache, slot_mapping, plans[window])
        assert hidden_states is not None
        return self.norm.add(hidden_states, residual)


def _plan(attn: AttentionMetadata, kv_cache: KVCache, window: int | None) -> AttentionPlan:
    """What attention needs to know of the step, worked out once for all layers with the same window."""
    return plan_attention(
        attn.block_tables, attn.query_start_loc, attn.seq_lens, k_cache=kv_cache[0], sliding_window=window
    )


class CausalLM(nn.Module):
    """A language model: Decoder and the projection to the vocabulary. Parameters have Hugging Face's names.

    packed_modules: a fused module to the checkpoint's modules whose rows it joins, in order.
    config: what it was built from.

    To use one: build_model (parameters on the meta device), load_weights, prepare, then forward.
    """

    packed_modules: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    )

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = (
            None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    @classmethod
    def read_options(cls, fields: ConfigFields) -> ArchitectureOptions:
        """What this architecture takes from config.json beyond the fields that all have."""
        return ArchitectureOptions()

    @property
    def ignored_weights(self) -> tuple[str, ...]:
        """Regular expressions of checkpoint tensors that are rightly not loaded."""
        frequencies = r"rotary_emb\.inv_freq$"  # old checkpoints stored what the config already says
        return (frequencies, r"^lm_head\.weight$") if self.lm_head is None else (frequencies,)

    def prepare(self, device: torch.device, dtype: torch.dtype, max_model_len: int) -> None:
        """Build what is computed, not loaded: tables for positions < max_model_len. Call after loading."""
        self.model.rotary_emb.prepare(device, max_model_len)

    def forward(self, model_input: ModelInput, kv_caches: Sequence[KVCache]) -> torch.Tensor:
        """One step: hidden states (T, hidden) of its tokens; their keys and values go to kv_caches."""
        hidden_states: torch.Tensor = self.model(model_input, kv_caches)
        return hidden_states

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(L, hidden) -> (L, V) float32."""
        weight = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(hidden_states, weight).float()
