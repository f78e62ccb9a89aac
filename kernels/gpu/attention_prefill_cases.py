"""Cases of the prefill attention kernel: what its parity tests call it with, and what serving does."""

from collections.abc import Sequence
from typing import Any

import torch

from halimede.kernels.attention import paged_attention_reference
from halimede.kernels.gpu.attention_cases import ROWS, Row, make_step
from halimede.kernels.spec import Case, Tensors, Work

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_E4M3, _INT8 = torch.float8_e4m3fn, torch.int8
# Past the first tile by more than a block of query tokens: whole tiles, with some on both sides.
_LONG: tuple[Row, ...] = ((18, 230), (2, 200))
_SERVED: tuple[Row, ...] = ((2048, 2048), (2048, 8192))


def reference(*, min_query_len: int = 2, **step: Any) -> Tensors:
    """The oracle, with zeros for the tokens of rows below min_query_len."""
    # Decoding rows read nothing but their table, so they may be computed and dropped.
    out = paged_attention_reference(**step)
    starts = step["query_start_loc"].long()
    counts = starts.diff()
    is_handled = (counts >= min_query_len).repeat_interleave(counts)
    return (out * is_handled[:, None, None],)


def _case(name: str, rows: Sequence[Row], options: dict[str, Any], **shape: Any) -> Case:
    """options: keyword arguments of the kernel beside the step; shape: make_step's."""

    def make(device: torch.device) -> dict[str, Any]:
        return make_step(device, rows, **shape) | options

    return Case(name, make, _work(rows, options, **shape))


def _work(
    rows: Sequence[Row],
    options: dict[str, Any],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = _BF16,
    cache_dtype: torch.dtype | None = None,
    **_: Any,
) -> Work:
    pairs, keys, tokens = 0, 0, 0
    for count, length in rows:
        if count < options.get("min_query_len", 2):
            continue
        pairs += sum(_seen(position, length, options) for position in range(length - count, length))
        keys += length - max(0, length - count - options.get("sliding_window", length) + 1)
        tokens += count
    moved = 2 * tokens * heads * dtype.itemsize + 2 * keys * kv_heads * (cache_dtype or dtype).itemsize
    return Work(bytes=moved * head_dim, flops=4 * pairs * heads * head_dim)


def _seen(position: int, length: int, options: dict[str, Any]) -> int:
    """Keys that the token at a position sees."""
    last = position + 1 if options.get("causal", True) else length
    return last - max(0, position - int(options.get("sliding_window", length)) + 1)


def _small(name: str, rows: Sequence[Row], options: dict[str, Any] | None = None, **shape: Any) -> Case:
    return _case(name, rows, options or {}, **({"heads": 2, "kv_heads": 1, "head_dim": 64} | shape))


def _served(name: str, heads: int, kv_heads: int, head_dim: int, **options: Any) -> Case:
    """options: the kernel's, and make_step's."""
    ours = ("causal", "sliding_window", "softcap")
    shape = {key: value for key, value in options.items() if key not in ours}
    own = {key: value for key, value in options.items() if key in ours}
    return _case(name, _SERVED, own, heads=heads, kv_heads=kv_heads, head_dim=head_dim, **shape)


_SCALED: dict[str, Any] = {"cache_dtype": _E4M3}
_PER_TOKEN: dict[str, Any] = {"scale_per_token": True}
_SMALL_ROWS: tuple[Row, ...] = ((9, 90), (1, 33), (3, 3))

CASES = (
    # First those that notice most of what could be wrong.
    _small("sinks, softcap", _SMALL_ROWS, {"softcap": 3.0}, sinks=True, dtype=_FP32),
    _small("gpt-oss", _LONG, {"sliding_window": 128}, sinks=True, block_size=64),
    _small("head of 96, e4m3 per token", _SMALL_ROWS, head_dim=96, **_SCALED, **_PER_TOKEN),
    _small("e4m3", _LONG, **_SCALED),
    _small("window over whole tiles", ((5, 400),), {"sliding_window": 300}, dtype=_FP32, block_size=64),
    _small("rows of six tokens and more", ROWS["mixed"], {"min_query_len": 6}),
    *(_small(name, rows, heads=4, kv_heads=2) for name, rows in ROWS.items()),
    _small("several tiles, float16", _LONG, dtype=_FP16),
    _small("several tiles, float32", _LONG, dtype=_FP32, block_size=32),
    _small("group of 7", _SMALL_ROWS, heads=7),
    _small("group of 16", _SMALL_ROWS, heads=16, head_dim=16),
    _small("group of 1, float32", _SMALL_ROWS, kv_heads=2, dtype=_FP32),
    _small("head of 80, blocks of 128", _SMALL_ROWS, head_dim=80, dtype=_FP32, block_size=128),
    _small("head of 192", _SMALL_ROWS, head_dim=192),
    _small("window, float32", _LONG, {"sliding_window": 100}, dtype=_FP32),
    _small("window of 1", _SMALL_ROWS, {"sliding_window": 1}),
    _small("softcap", _SMALL_ROWS, {"softcap": 2.0}, dtype=_FP32),
    _small("Gemma", _SMALL_ROWS, {"softcap": 50.0, "sliding_window": 40}, head_dim=256),
    _small("bidirectional", ((20, 70), (3, 3)), {"causal": False}, dtype=_FP32),
    _small("bidirectional, window", ((5, 190),), {"causal": False, "sliding_window": 9}, block_size=64),
    _small("e4m3 per token, blocks of 128", _LONG, **_SCALED, **_PER_TOKEN, block_size=128),
    _small("e4m3, float16, softcap", _SMALL_ROWS, {"softcap": 5.0}, **_SCALED, dtype=_FP16),
    _small("int8, float32", _SMALL_ROWS, cache_dtype=_INT8, dtype=_FP32),
    _small("int8 per token", _LONG, cache_dtype=_INT8, **_PER_TOKEN),
    _small("int8 per token, float16", _SMALL_ROWS, cache_dtype=_INT8, **_PER_TOKEN, dtype=_FP16),
    _small("rows of one token too", ROWS["mixed"], {"min_query_len": 1}),
)

SIGNATURES = (
    _served("Llama 3 8B", 32, 8, 128, block_size=64),
    _served("Qwen 2.5 7B", 28, 4, 128, block_size=16),
    _served("SmolLM2 135M, float16", 9, 3, 64, block_size=32, dtype=_FP16),
    _served("head of 80", 32, 32, 80, block_size=16),
    _served("Phi 3 mini, window", 32, 32, 96, block_size=64, sliding_window=2047),
    _served("Mistral 7B, window", 32, 8, 128, block_size=64, sliding_window=4096),
    _served("head of 192", 32, 8, 192, block_size=128),
    _served("Gemma 2 9B, window", 16, 8, 256, block_size=32, softcap=50.0, sliding_window=4096),
    _served("gpt-oss, window", 64, 8, 64, block_size=64, sinks=True, sliding_window=128),
    _served("bidirectional", 12, 12, 64, block_size=128, causal=False),
    _served("Llama 3 8B, e4m3", 32, 8, 128, block_size=16, cache_dtype=_E4M3),
    _served("Llama 3 8B, e4m3 per token", 32, 8, 128, block_size=64, cache_dtype=_E4M3, **_PER_TOKEN),
    _served("Qwen 2.5 7B, int8 per token", 28, 4, 128, block_size=64, cache_dtype=_INT8, **_PER_TOKEN),
    _served("SmolLM2 135M, int8, float16", 9, 3, 64, cache_dtype=_INT8, dtype=_FP16),
)
