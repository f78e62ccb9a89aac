"""Attention on a GPU: one Triton kernel prepares q and writes the cache, then a PagedAttention reads it.

On CPU tensors the kernels are interpreted: right, and many thousand times slower.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from halimede.engine.layers.attention_step import AttentionLayer, AttentionStep, LayerGroup
from halimede.engine.layers.attention_torch import make_plan
from halimede.engine.layers.rotary import CosSin
from halimede.engine.model_input import KVCache, ModelInput
from halimede.kernels.attention import paged_attention
from halimede.kernels.gpu.attention_decode import paged_attention_decode
from halimede.kernels.gpu.attention_decode_plan import (
    DecodeWorkspace,
    decode_workspace,
    default_split_size,
    plan_decode,
)
from halimede.kernels.gpu.attention_prefill import paged_attention_prefill
from halimede.kernels.gpu.rotary_kv import qk_norm_rotary_kv_write
from halimede.kernels.ops import Ops, triton_ops


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Rows that attend, as in AttentionMetadata, with what the host knows of their lengths."""

    block_tables: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    max_query_len: int
    max_seq_len: int
    num_decode_rows: int


class Attend(Protocol):
    """Attention of a step's rows in one layer: q (T, H, D) -> (T, H, D) contiguous."""

    def __call__(self, q: torch.Tensor, kv_cache: KVCache, scale: float) -> torch.Tensor:
        """scale: what q k^T is multiplied by."""
        ...


class PagedAttention(Protocol):
    """One way to read the paged cache."""

    def prepare(self, rows: PagedRows, kv_cache: KVCache, num_heads: int, window: int | None) -> Attend:
        """What all layers of a group share in a step. kv_cache: any layer's, for shape and dtype."""
        ...


@dataclass(frozen=True, slots=True)
class GpuStep:
    """A step as Triton kernels take it. tokens (S) int64: those that attend; None for all."""

    positions: torch.Tensor
    slot_mapping: torch.Tensor
    rope: CosSin
    attention: Attend
    tokens: torch.Tensor | None = None

    def attend(self, qkv: torch.Tensor, layer: AttentionLayer, kv_cache: KVCache) -> torch.Tensor:
        """As AttentionStep.attend."""
        q_norm, k_norm = layer.q_norm, layer.k_norm
        qk_norm_rotary_kv_write(
            qkv,
            self.positions,
            *self.rope,
            self.slot_mapping,
            kv_cache.k,
            kv_cache.v,
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            q_weight=None if q_norm is None else q_norm.weight,
            k_weight=None if k_norm is None else k_norm.weight,
            eps=0.0 if q_norm is None else q_norm.eps,
            k_scale=kv_cache.k_scale,
            v_scale=kv_cache.v_scale,
        )
        q = qkv[:, : layer.num_heads]
        if self.tokens is not None:
            q = q.index_select(0, self.tokens)
        return self.attention(q, kv_cache, layer.scale)


class GpuBackend:
    """Triton kernels, and `attention` to read the cache. ImportError where triton is not installed."""

    def __init__(self, attention: PagedAttention) -> None:
        self._attention = attention
        self.ops: Ops = triton_ops()

    def make_steps(
        self, model_input: ModelInput, groups: Sequence[LayerGroup], kv_cache: KVCache, num_heads: int
    ) -> list[GpuStep]:
        """As Backend.make_steps."""
        attn = model_input.attn
        rows = PagedRows(
            attn.block_tables,
            attn.query_start_loc,
            attn.seq_lens,
            attn.max_query_len,
            attn.max_seq_len,
            attn.num_decode_rows,
        )
        return [
            GpuStep(
                model_input.positions,
                attn.slot_mapping,
                group.rotary_emb.tables,
                self._attention.prepare(rows, kv_cache, num_heads, group.window),
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
    ) -> GpuStep:
        """As Backend.make_output_step."""
        outputs = model_input.outputs
        assert outputs is not None, "the step has outputs"
        assert isinstance(step, GpuStep), "the step is of this backend"
        rows = PagedRows(
            outputs.block_tables,
            outputs.query_start_loc,
            outputs.seq_lens,
            max_query_len=1,
            max_seq_len=model_input.attn.max_seq_len,
            num_decode_rows=outputs.seq_lens.shape[0],
        )
        attention = self._attention.prepare(rows, kv_cache, num_heads, group.window)
        return replace(step, attention=attention, tokens=model_input.logits_indices)


class TritonAttention:
    """Our kernels: rows of one token in one launch, the others in a second one.

    max_model_len: decides how long the pieces are that decoding cuts a context into, which must not hang on
    the batch. max_rows: of a step; one workspace for that many, made when the cache is first seen, serves
    every step, layer and graph.
    """

    def __init__(self, max_model_len: int, max_rows: int) -> None:
        self._max_model_len = max_model_len
        self._max_rows = max_rows
        self._split_size = default_split_size(max_model_len)
        self._workspace: DecodeWorkspace | None = None

    def prepare(self, rows: PagedRows, kv_cache: KVCache, num_heads: int, window: int | None) -> Attend:
        """As PagedAttention.prepare."""
        plan = None
        if rows.num_decode_rows:
            plan = plan_decode(
                rows.query_start_loc,
                rows.seq_lens,
                num_heads=num_heads,
                num_kv_heads=kv_cache.k.shape[1],
                head_dim=kv_cache.k.shape[3],
                max_seq_len=rows.max_seq_len,
                sliding_window=window,
                split_size=self._split_size,
                workspace=self._shared_workspace(kv_cache, num_heads),
            )

        def attend(q: torch.Tensor, kv_cache: KVCache, scale: float) -> torch.Tensor:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            inputs = q, kv_cache.k, kv_cache.v, rows.block_tables, rows.query_start_loc, rows.seq_lens
            k_scale, v_scale = kv_cache.k_scale, kv_cache.v_scale
            if plan is not None:
                paged_attention_decode(
                    *inputs,
                    plan,
                    out,
                    scale=scale,
                    sliding_window=window,
                    k_scale=k_scale,
                    v_scale=v_scale,
                )
            if rows.max_query_len > 1:
                paged_attention_prefill(
                    *inputs, out, scale=scale, sliding_window=window, k_scale=k_scale, v_scale=v_scale
                )
            return out

        return attend

    def _shared_workspace(self, kv_cache: KVCache, num_heads: int) -> DecodeWorkspace:
        if self._workspace is None:
            _, num_kv_heads, _, head_dim = kv_cache.k.shape
            self._workspace = decode_workspace(
                self._max_rows,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                max_seq_len=self._max_model_len,
                device=kv_cache.k.device,
                split_size=self._split_size,
            )
        return self._workspace


class TorchAttention:
    """torch's scaled_dot_product_attention over gathered keys and values; reads lengths back to the host."""

    def prepare(self, rows: PagedRows, kv_cache: KVCache, num_heads: int, window: int | None) -> Attend:
        """As PagedAttention.prepare."""
        plan = make_plan(rows, kv_cache, num_heads, window)

        def attend(q: torch.Tensor, kv_cache: KVCache, scale: float) -> torch.Tensor:
            return paged_attention(q, kv_cache.k, kv_cache.v, plan, scale)

        return attend
