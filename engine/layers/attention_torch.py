"""Attention in torch, for CPUs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from halimede.engine.layers.attention_step import AttentionLayer, AttentionStep, LayerGroup
from halimede.engine.model_input import KVCache, ModelInput
from halimede.kernels.attention import paged_attention
from halimede.kernels.attention_plan import AttentionPlan, plan_attention
from halimede.kernels.kv_cache import cache_rows, write_kv
from halimede.kernels.ops import TORCH, Ops
from halimede.kernels.rotary import RotaryFactors, apply_rotary, rotary_factors


class _Rows(Protocol):
    """Of AttentionMetadata and its like, what a plan is made of."""

    @property
    def block_tables(self) -> torch.Tensor: ...
    @property
    def query_start_loc(self) -> torch.Tensor: ...
    @property
    def seq_lens(self) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class TorchStep:
    """A step in tensors that torch's operations take, worked out once for all layers of a group.

    kv_rows (T * K): where keys and values go, see write_kv. tokens (S) int64: those whose attention is wanted
    and the plan is made for; None for all.
    """

    rope: RotaryFactors
    kv_rows: torch.Tensor
    plan: AttentionPlan
    tokens: torch.Tensor | None = None

    def attend(self, qkv: torch.Tensor, layer: AttentionLayer, kv_cache: KVCache) -> torch.Tensor:
        """As AttentionStep.attend."""
        heads, kv_heads = layer.num_heads, layer.num_kv_heads
        q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
        if layer.q_norm is None or layer.k_norm is None:
            apply_rotary(qkv[:, : heads + kv_heads], self.rope)  # q and k are neighbours: one call for both
        else:
            q, k = layer.q_norm(q), layer.k_norm(k)
            apply_rotary(q, self.rope)
            apply_rotary(k, self.rope)
        write_kv(k, v, kv_cache.k, kv_cache.v, self.kv_rows)
        if self.tokens is not None:
            q = q[self.tokens]
            if q.shape[0] == 0:
                return q
        return paged_attention(q, kv_cache.k, kv_cache.v, self.plan, layer.scale)


class TorchBackend:
    """torch's operations throughout."""

    ops: Ops = TORCH

    def make_steps(
        self, model_input: ModelInput, groups: Sequence[LayerGroup], kv_cache: KVCache, num_heads: int
    ) -> list[TorchStep]:
        """As Backend.make_steps."""
        kv_rows = _kv_rows(model_input, kv_cache)
        return [
            TorchStep(
                rotary_factors(*group.rotary_emb(model_input.positions)),
                kv_rows,
                make_plan(model_input.attn, kv_cache, num_heads, group.window),
            )
            for group in groups
        ]

    def make_output_step(
        self,
        step: AttentionStep,
        model_input: ModelInput,
        group: LayerGroup,
        kv_cache: KVCache,
        num_heads: int,
    ) -> TorchStep:
        """As Backend.make_output_step."""
        assert model_input.outputs is not None, "the step has outputs"
        assert isinstance(step, TorchStep), "the step is of this backend"
        plan = make_plan(model_input.outputs, kv_cache, num_heads, group.window)
        return replace(step, plan=plan, tokens=model_input.logits_indices)


def make_plan(attn: _Rows, kv_cache: KVCache, num_heads: int, window: int | None) -> AttentionPlan:
    """plan_attention for a step's rows."""
    return plan_attention(
        attn.block_tables,
        attn.query_start_loc,
        attn.seq_lens,
        num_heads=num_heads,
        k_cache=kv_cache.k,
        sliding_window=window,
    )


def _kv_rows(model_input: ModelInput, kv_cache: KVCache) -> torch.Tensor:
    num_kv_heads, block_size = kv_cache.k.shape[1:3]
    return cache_rows(model_input.attn.slot_mapping[:, None], num_kv_heads, block_size).flatten()
