"""Self-attention over the paged KV cache."""

import torch
from torch import nn

from halimede.engine.layers.attention_step import AttentionStep
from halimede.engine.layers.linear import Linear, MergedLinear
from halimede.engine.layers.norm import RMSNorm
from halimede.engine.model_input import KVCache
from halimede.engine.quant.forms.base import Activations


class SelfAttention(nn.Module):
    """Causal grouped-query attention: q, k, v as one matrix product, optional norm over each head of q and k.

    scale: what q k^T is multiplied by, None is head_dim^-0.5. k_scale, v_scale: what the checkpoint says keys
    and values are to be divided by in an 8-bit KV cache with one scale. Whether the layer has a sliding
    window is the step's business, not the layer's.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        bias: bool,
        output_bias: bool,
        qk_norm_eps: float | None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.k_scale = self.v_scale = 1.0
        kv_size = num_kv_heads * head_dim
        self.qkv_proj = MergedLinear(hidden_size, (num_heads * head_dim, kv_size, kv_size), bias=bias)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias=output_bias)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)

    def forward(self, hidden_states: Activations, step: AttentionStep, kv_cache: KVCache) -> torch.Tensor:
        """(T, hidden) -> (T, hidden), or (S, hidden) of the step's outputs; see AttentionStep."""
        qkv: torch.Tensor = self.qkv_proj(hidden_states)
        qkv = qkv.view(-1, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        context = step.attend(qkv, self, kv_cache)
        if context.shape[0] == 0:
            return qkv.new_empty(0, self.o_proj.out_features)
        output: torch.Tensor = self.o_proj(context.view(-1, self.num_heads * self.head_dim))
        return output
