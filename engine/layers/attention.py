"""Self-attention over the paged KV cache."""

import torch
from torch import nn

from halimede.engine.layers.linear import Linear, MergedLinear
from halimede.engine.layers.norm import RMSNorm
from halimede.engine.model_input import KVCache
from halimede.kernels.attention import paged_attention
from halimede.kernels.attention_plan import AttentionPlan
from halimede.kernels.kv_cache import write_kv
from halimede.kernels.rotary import RotaryFactors, apply_rotary


class SelfAttention(nn.Module):
    """Causal grouped-query attention: q, k, v as one matrix product, optional norm over each head of q and k.

    scale: what q k^T is multiplied by, None is head_dim^-0.5. Whether the layer has a sliding window is the
    plan's business, not the layer's.
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
        kv_size = num_kv_heads * head_dim
        self.qkv_proj = MergedLinear(hidden_size, (num_heads * head_dim, kv_size, kv_size), bias=bias)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias=output_bias)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rope: RotaryFactors,
        kv_cache: KVCache,
        kv_rows: torch.Tensor,
        plan: AttentionPlan,
        tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(T, hidden) -> (T, hidden); writes the tokens' keys and values to the cache before reading it.

        kv_rows (T * K): where they go, see write_kv.
        tokens (O) int64: those whose attention is wanted and the plan is made for; the result is (O, hidden).
        """
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv: torch.Tensor = self.qkv_proj(hidden_states)
        qkv = qkv.view(-1, heads + 2 * kv_heads, self.head_dim)
        q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
        if self.q_norm is None or self.k_norm is None:
            apply_rotary(qkv[:, : heads + kv_heads], rope)  # q and k are neighbours: one call rotates both
        else:
            q, k = self.q_norm(q), self.k_norm(k)
            apply_rotary(q, rope)
            apply_rotary(k, rope)
        write_kv(k, v, *kv_cache, kv_rows)
        if tokens is not None:
            q = q[tokens]
            if q.shape[0] == 0:
                return hidden_states[:0]
        context = paged_attention(q, *kv_cache, plan, self.scale)
        output: torch.Tensor = self.o_proj(context.view(-1, heads * self.head_dim))
        return output
