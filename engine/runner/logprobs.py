"""Log-probabilities and ranks, taken from raw logits."""

from collections.abc import Sequence

import torch

from halimede.scheduler.output import TokenLogprobs


def token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_logprobs: Sequence[int]
) -> list[TokenLogprobs]:
    """The log-probabilities at each row of float32 logits (P, V): of token_ids[row] (P) int64 first, then
    of its num_logprobs[row] most probable tokens (-1: all), equal ones in order of token id.
    """
    vocab_size = logits.shape[-1]
    total = logits.logsumexp(dim=-1, keepdim=True)
    own = logits.gather(1, token_ids.unsqueeze(1))
    own_ranks = 1 + (logits > own).sum(dim=-1)
    counts = [vocab_size if n == -1 else min(n, vocab_size) for n in num_logprobs]
    values, ids = _top(logits, max(counts))
    ranks = 1 + torch.searchsorted(-values, -values) if max(counts) else ids
    columns = (token_ids, (own - total).squeeze(1), own_ranks, ids, values - total, ranks)
    return logprob_entries(*(column.tolist() for column in columns), num_logprobs=counts)


def logprob_entries(
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    ranks: Sequence[int],
    top_ids: Sequence[Sequence[int]],
    top_logprobs: Sequence[Sequence[float]],
    top_ranks: Sequence[Sequence[int]],
    *,
    num_logprobs: Sequence[int],
) -> list[TokenLogprobs]:
    """Of each row its token and the first num_logprobs[row] of its most probable tokens (-1: all of them)."""
    counts = [None if n == -1 else n for n in num_logprobs]
    return [
        TokenLogprobs((token, *ids[:n]), (logprob, *values[:n]), (rank, *places[:n]))
        for n, token, logprob, rank, ids, values, places in zip(
            counts, token_ids, logprobs, ranks, top_ids, top_logprobs, top_ranks, strict=True
        )
    ]


def _top(logits: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and ids (P, n) of the n largest logits, equal ones in order of id (topk leaves that open)."""
    if n == logits.shape[-1]:
        return logits.sort(dim=-1, descending=True, stable=True)
    if n == 0:
        return logits[:, :0], torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
    values, ids = logits.topk(n, dim=-1)
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, order)
    # Where more tokens equal the last one, topk may have taken any of them.
    tied = ((logits >= values[:, -1:]).sum(dim=-1) > n).nonzero().squeeze(1)
    if len(tied):
        tied_values, tied_ids = logits[tied].sort(dim=-1, descending=True, stable=True)
        values[tied], ids[tied] = tied_values[:, :n], tied_ids[:, :n]
    return values, ids
