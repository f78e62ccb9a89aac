"""Attention of a step's tokens over the paged KV cache: y = softmax(q k^T * scale + mask) v, causal.

Layouts: q, y (T, H, D); caches (N, K, B, D) contiguous; H / K query heads share a kv head. A query token at
position p sees the keys at positions p - sliding_window + 1 .. p, or 0 .. p without a window. Decode reads
2 * context * K * D elements per row and does 4 * context * H * D FLOPs on them; prefill multiplies the FLOPs
by its query tokens.

Only slots that hold a token are ever read: what lies in the others, even NaN, does not matter. Query heads of
one kv head are a dimension of their own against a broadcast k and v, which on a CPU is 20x faster in decode
than SDPA's enable_gqa. SDPA accumulates in float32 whatever the dtype. Where q is wider than the cache, what
is gathered is widened first.

On a CPU several rows of decoding do without SDPA. The weighted sum of values that lie about in a cache is
what embedding_bag computes, so they need not be gathered: half of the time at 32 rows. Scores are float32
there, and the weights are rounded to the cache's dtype.
"""

import torch
import torch.nn.functional as F

from halimede.kernels.attention_plan import AttentionPlan, DecodeBatch, DecodeScratch, PrefillRow


def paged_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    causal: bool = True,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The oracle of every attention: one query token and head at a time, float64 inside.

    causal=False: a token sees its whole sequence. softcap: scores s become softcap * tanh(s / softcap).
    sinks (H): a score of each head that takes its part of the softmax and gives nothing (gpt-oss).
    k_scale, v_scale: of a quantized cache, (1) or per token and head [N, K, B] float32: value = code * scale.
    """
    group, block_size = q.shape[1] // k_cache.shape[1], k_cache.shape[2]
    keys, values = _dequantized(k_cache, k_scale), _dequantized(v_cache, v_scale)
    output = torch.empty_like(q)
    for row, seq_len in enumerate(seq_lens.tolist()):
        start, stop = query_start_loc[row : row + 2].tolist()
        for token in range(start, stop):
            position = seq_len - (stop - token)
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            seen = torch.arange(first, position + 1 if causal else seq_len, device=q.device)
            blocks, offsets = block_tables[row, seen // block_size].long(), seen % block_size
            for head in range(q.shape[1]):
                scores = keys[blocks, head // group, offsets] @ q[token, head].double() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat((scores, sinks[head : head + 1].double()))
                weights = torch.softmax(scores, dim=0)[: len(seen)]
                output[token, head] = (weights @ values[blocks, head // group, offsets]).to(q.dtype)
    return output


def _dequantized(cache: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """A cache (N, K, B, D) in float64."""
    if scale is None:
        return cache.double()
    return cache.float().double() * scale.double().view(*scale.shape, *(1,) * (4 - scale.dim()))


def paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: AttentionPlan, scale: float
) -> torch.Tensor:
    """Attention of all the step's query tokens: q (T, H, D) -> (T, H, D) contiguous.

    k_cache, v_cache (N, K, B, D) hold the step's own keys and values already. Tokens of no row are left
    undefined.
    """
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    assert q.shape[1] % num_kv_heads == 0, f"{q.shape[1]} heads do not share {num_kv_heads} kv heads evenly"
    assert q.shape[2] == head_dim, f"q has head_dim {q.shape[2]}, the cache {head_dim}"
    keys, values = k_cache.view(-1, head_dim), v_cache.view(-1, head_dim)
    grouped = q.unflatten(1, (num_kv_heads, -1))  # type: ignore[no-untyped-call]
    if plan.decode and plan.decode[0].tokens is None:  # the whole step
        return _attend_decode(grouped, keys, values, plan.decode[0], plan.scratch, scale).flatten(1, 2)
    output = q.new_empty(grouped.shape)
    for batch in plan.decode:
        assert batch.tokens is not None, "a batch beside others has its own tokens"
        output[batch.tokens] = _attend_decode(grouped, keys, values, batch, plan.scratch, scale)
    for row in plan.prefill:
        _attend_prefill(grouped, keys, values, row, scale, output)
    return output.flatten(1, 2)


def _attend_decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: DecodeBatch,
    scratch: DecodeScratch,
    scale: float,
) -> torch.Tensor:
    """Rows with one query token: q (T, K, H / K, D), keys and values (N * K * B, D) -> (G, K, H / K, D)."""
    query = q if batch.tokens is None else q[batch.tokens]
    if batch.bags is not None:
        return _attend_in_bags(query, keys, values, batch, scratch, scale)
    shape = (query.shape[0], query.shape[1], -1, query.shape[3])
    k = _gather(keys, batch.cache_rows, q.dtype, scratch.k, scratch.wide_k).view(shape)
    v = _gather(values, batch.cache_rows, q.dtype, scratch.v, scratch.wide_v).view(shape)
    return F.scaled_dot_product_attention(query, k, v, attn_mask=batch.mask, scale=scale)


def _attend_in_bags(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: DecodeBatch,
    scratch: DecodeScratch,
    scale: float,
) -> torch.Tensor:
    """As _attend_decode: gathers the keys only, and sums the values up where they lie."""
    assert batch.bags is not None, "a batch without bags is not for this way"
    assert batch.mask is not None, "bags are for batches that have a mask"
    rows, num_kv_heads, group, head_dim = query.shape
    k = _gather(keys, batch.cache_rows, torch.float32, scratch.k, scratch.wide_k)
    scaled = (query.float() * scale).view(rows * num_kv_heads, group, head_dim)
    scores = torch.bmm(scaled, k.view(rows * num_kv_heads, -1, head_dim).transpose(1, 2))
    scores = scores.view(rows, num_kv_heads, group, -1).add_(batch.mask)
    weights = torch.softmax(scores, dim=-1).to(values.dtype).view(-1)
    bags = batch.bags
    summed = torch.embedding_bag(values, bags.rows, bags.starts, False, 0, False, weights)[0]
    return summed.view(query.shape).to(query.dtype)


def _gather(
    cache: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype, memory: torch.Tensor, wide: torch.Tensor
) -> torch.Tensor:
    """Rows of a cache (N * K * B, D) in `dtype`, its own or float32; they lie in memory, or in wide."""
    size = rows.shape[0]
    gathered = torch.index_select(cache, 0, rows, out=memory[:size])
    return gathered if gathered.dtype == dtype else wide[:size].copy_(gathered)


def _attend_prefill(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    row: PrefillRow,
    scale: float,
    output: torch.Tensor,
) -> None:
    """One row with several query tokens; shapes as in _attend_decode."""
    num_kv_heads, group, head_dim = q.shape[1:]
    shape = (num_kv_heads, 1, -1, head_dim)
    k = keys.index_select(0, row.cache_rows).to(q.dtype).view(shape).expand(-1, group, -1, -1)
    v = values.index_select(0, row.cache_rows).to(q.dtype).view(shape).expand(-1, group, -1, -1)
    for tile in row.tiles:
        tokens, seen = slice(tile.start, tile.stop), slice(tile.first_key, tile.last_key)
        attended = F.scaled_dot_product_attention(
            q[tokens].permute(1, 2, 0, 3),
            k[:, :, seen],
            v[:, :, seen],
            attn_mask=tile.mask,
            is_causal=tile.mask is None,
            scale=scale,
        )
        output[tokens] = attended.permute(2, 0, 1, 3)
