"""What sampling parameters do to logits, in vLLM's order: masks, bias, penalties; then, for rows that draw,
temperature, min_p, top_k and top_p. Everything works in place on float32 logits (rows, V).
"""

from collections.abc import Callable

import numpy as np
import torch

from halimede.engine.runner.sampling_metadata import Penalties, RandomRows, SamplingMetadata

_Keep = Callable[[torch.Tensor, torch.Tensor], None]

# Enough of the most probable tokens to hold top_p of the mass for all but nearly flat distributions;
# finding them costs a tenth of sorting the vocabulary.
_TOP_P_CANDIDATES = 1024


def adjust_logits(logits: torch.Tensor, metadata: SamplingMetadata) -> None:
    """Apply what can change the most probable token: allowed, banned and biased tokens, penalties.

    logits: float32 (S, V), changed in place; a forbidden token's becomes -inf.
    """
    for row, forbidden in metadata.forbidden:
        logits[row].masked_fill_(forbidden, -torch.inf)
    if metadata.banned is not None:
        logits[metadata.banned] = -torch.inf
    if metadata.bias is not None:
        rows, tokens, values = metadata.bias
        logits[rows, tokens] += values
    if metadata.penalties is not None:
        _penalize(logits, metadata.penalties)


def _penalize(logits: torch.Tensor, penalties: Penalties) -> None:
    """Repetition over prompt and output, then frequency and presence over the output."""
    picked = logits[penalties.rows, penalties.token_ids]
    picked = torch.where(picked > 0, picked / penalties.repetition, picked * penalties.repetition)
    picked -= penalties.frequency * penalties.output_counts
    picked -= penalties.presence * (penalties.output_counts > 0)
    logits[penalties.rows, penalties.token_ids] = picked


def filter_logits(logits: torch.Tensor, random: RandomRows) -> None:
    """Apply the temperature, then leave only what min_p, top_k and top_p keep; the rest becomes -inf.

    logits: float32 (D, V), the rows that draw, changed in place.
    """
    logits /= random.temperature
    if random.min_p is not None:
        # probability >= min_p * the largest one, with the logarithm of both sides taken.
        least = logits.amax(dim=-1, keepdim=True) + random.min_p.log()
        logits.masked_fill_(logits < least, -torch.inf)
    if random.top_k is not None:
        _on_rows(logits, random.top_k < logits.shape[-1], random.top_k, keep_top_k)
    if random.top_p is not None:
        _on_rows(logits, random.top_p < 1, random.top_p, keep_top_p)


def _on_rows(logits: torch.Tensor, used: torch.Tensor, values: torch.Tensor, keep: _Keep) -> None:
    """Run `keep` on the rows where `used`, so that the others pay nothing."""
    rows = used.nonzero().squeeze(1)
    if len(rows) == len(logits):
        keep(logits, values)
        return
    picked = logits[rows]
    keep(picked, values[rows])
    logits[rows] = picked


def keep_top_k(logits: torch.Tensor, k: torch.Tensor) -> None:
    """Leave in each row of (D, V) its k (D) largest logits, and all that equal the last of them."""
    largest = logits.topk(int(k.max()), dim=-1).values
    logits.masked_fill_(logits < largest.gather(1, k.unsqueeze(1) - 1), -torch.inf)


def keep_top_p(logits: torch.Tensor, p: torch.Tensor) -> None:
    """Leave in each row of (D, V) the fewest tokens whose probabilities sum to at least p (D).

    At least one token stays; among equal logits the lower token ids do. Only sorted *values* decide where
    the cut is, so that the order in which a sort returns equal logits, or the batch, changes nothing.
    """
    size = min(_TOP_P_CANDIDATES, logits.shape[-1])
    total = logits.logsumexp(dim=-1, keepdim=True)
    largest = logits.topk(size, dim=-1).values
    missing = ((largest - total).exp().sum(dim=-1) < p).nonzero().squeeze(1)
    if size == logits.shape[-1] or len(missing) == 0:
        _cut(logits, largest, total, p)
        return
    found = torch.ones_like(p, dtype=torch.bool).index_fill_(0, missing, False).nonzero().squeeze(1)
    for rows, full in ((found, False), (missing, True)):
        if len(rows) == 0:
            continue
        picked = logits[rows]
        values = _sorted_values(picked) if full else largest[rows]
        _cut(picked, values, total[rows], p[rows])
        logits[rows] = picked


def _sorted_values(logits: torch.Tensor) -> torch.Tensor:
    """Each row's logits in descending order."""
    if logits.device.type == "cpu":
        # Sorting values without their places is what NumPy has vector code for; torch takes ten times longer.
        return torch.from_numpy(np.sort(logits.neg().numpy(), axis=-1)).neg_()
    return logits.sort(dim=-1, descending=True).values


def _cut(logits: torch.Tensor, largest: torch.Tensor, total: torch.Tensor, p: torch.Tensor) -> None:
    """Apply keep_top_p given each row's largest logits in descending order and its logsumexp (D, 1)."""
    cumulative = (largest - total).exp().cumsum(dim=-1)
    # A token stays while the ones above it hold less than p; the first one always does.
    kept = 1 + (cumulative[:, :-1] < p.unsqueeze(1)).sum(dim=-1, keepdim=True)
    last = largest.gather(1, kept - 1)
    dropped = logits < last
    if bool((logits.shape[-1] - dropped.sum(dim=-1, keepdim=True) > kept).any()):
        # More tokens equal the last one than there is room for.
        equal = logits == last
        room = kept - (largest > last).sum(dim=-1, keepdim=True)
        dropped |= equal & (equal.cumsum(dim=-1) > room)
    logits.masked_fill_(dropped, -torch.inf)
