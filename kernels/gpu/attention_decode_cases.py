"""Cases and signatures of decode attention, and its reference."""

from collections.abc import Sequence
from typing import Any

import torch

from halimede.kernels.attention import paged_attention_reference
from halimede.kernels.gpu.attention_cases import ROWS, Row, make_step
from halimede.kernels.spec import Case, Tensors, Work


def reference(*, split_size: int, max_seq_len: int, **arguments: Any) -> Tensors:
    """Tokens of rows with one query token, others 0; and the counters as they must be left."""
    starts = arguments["query_start_loc"]
    attended = paged_attention_reference(**arguments)
    counts = starts.diff()
    decodes = torch.repeat_interleave(counts == 1, counts)
    rows, num_kv_heads = arguments["seq_lens"].shape[0], arguments["k_cache"].shape[1]
    counters = torch.zeros(rows * num_kv_heads, dtype=torch.int32)
    return attended.masked_fill(~decodes[:, None, None], 0), counters


def _case(
    name: str,
    rows: Sequence[Row],
    *,
    split: int = 32,
    window: int | None = None,
    softcap: float | None = None,
    max_seq_len: int | None = None,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    **shapes: Any,
) -> Case:
    longest = max_seq_len or max((length for _, length in rows), default=1) + 1

    def make(device: torch.device) -> dict[str, Any]:
        step = make_step(device, rows, heads=heads, kv_heads=kv_heads, head_dim=head_dim, **shapes)
        options = {"sliding_window": window, "softcap": softcap}
        return {**step, **options, "split_size": split, "max_seq_len": longest}

    dtype = shapes.get("cache_dtype") or shapes.get("dtype", torch.bfloat16)
    seen = sum(min(length, window or length) for count, length in rows if count == 1)
    per_token = head_dim * dtype.itemsize + 4 * bool(shapes.get("scale_per_token"))
    work = Work(bytes=2 * seen * kv_heads * per_token, flops=4 * seen * heads * head_dim)
    return Case(name, make, work)


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_FP8, _INT8 = torch.float8_e4m3fn, torch.int8
# Full tiles and a last one, several splits; short, because the interpreter takes a second for twenty tiles.
_ROWS: tuple[Row, ...] = ((1, 43), (1, 7))
_ONE_HEAD = {"heads": 2, "kv_heads": 1}

CASES = (
    _case("window 17", _ROWS, window=17, split=16, dtype=_FP32, **_ONE_HEAD),
    *(_case(f"{c} for {t}", _ROWS, cache_dtype=c, dtype=t) for c, t in ((_FP8, _BF16), (_INT8, _FP16))),
    *(_case(name, rows, **_ONE_HEAD) for name, rows in ROWS.items()),
    *(_case(f"{t}, split 16", _ROWS, dtype=t, split=16) for t in (_FP16, _FP32)),
    _case("one split, float16", _ROWS, split=128, dtype=_FP16),
    _case("split 64, blocks of 128", ((1, 150), (1, 64)), split=64, block_size=128, **_ONE_HEAD),
    _case("blocks of 32", ((1, 33), (1, 64)), block_size=32, dtype=_FP32, **_ONE_HEAD),
    *(
        _case(f"window {n}", ((1, 64), (1, 90)), window=n, block_size=32, **_ONE_HEAD)
        for n in (1, 33, 64, 1000)
    ),
    _case("softcap", _ROWS, softcap=3.0, dtype=_FP32),
    _case("sinks", _ROWS, sinks=True, dtype=_FP32),
    _case("sinks, one split, window", _ROWS, sinks=True, split=128, window=20),
    *(_case(f"head_dim {n}", _ROWS, head_dim=n, **_ONE_HEAD) for n in (80, 96, 192, 256)),
    _case("head_dim 24", _ROWS, head_dim=24, dtype=_FP32, **_ONE_HEAD),
    _case("group 1", _ROWS, heads=2, kv_heads=2),
    _case("group 7", _ROWS, heads=14, kv_heads=2, dtype=_FP16),
    _case("group 16", _ROWS, heads=16, kv_heads=1),
    _case("group 20", _ROWS, heads=20, kv_heads=1),
    *(_case(f"{c} for {t}", _ROWS, cache_dtype=c, dtype=t) for c, t in ((_FP8, _FP16), (_INT8, _BF16))),
    *(_case(f"{c} per token", _ROWS, cache_dtype=c, scale_per_token=True) for c in (_FP8, _INT8)),
    _case("int8 per token, float32", _ROWS, cache_dtype=_INT8, scale_per_token=True, dtype=_FP32),
    _case("float8, head_dim 80", _ROWS, cache_dtype=_FP8, head_dim=80, split=128, block_size=64),
    _case("many rows", ((1, 5), (0, 3), (1, 40), (2, 9)) * 4, **_ONE_HEAD),
)


def _serving(name: str, heads: int, kv_heads: int, head_dim: int, **options: Any) -> Case:
    """32 rows of up to 8192 tokens; their lengths are not part of what is compiled."""
    shapes = {"split": 256, "block_size": 64, "max_seq_len": 8192} | options
    return _case(name, ((1, 8192),) * 32, heads=heads, kv_heads=kv_heads, head_dim=head_dim, **shapes)


SIGNATURES = (
    _serving("H 32, K 8, D 128", 32, 8, 128),
    _serving("H 32, K 8, D 128, float16, blocks of 16", 32, 8, 128, dtype=_FP16, block_size=16),
    _serving("H 32, K 8, D 128, float8", 32, 8, 128, cache_dtype=_FP8),
    _serving("H 32, K 8, D 128, int8 per token", 32, 8, 128, cache_dtype=_INT8, scale_per_token=True),
    _serving("H 28, K 4, D 128, blocks of 128", 28, 4, 128, block_size=128),
    _serving("H 9, K 3, D 64", 9, 3, 64),
    _serving("H 32, K 32, D 80", 32, 32, 80),
    _serving("H 32, K 32, D 96, blocks of 32", 32, 32, 96, block_size=32),
    _serving("H 16, K 8, D 192", 16, 8, 192),
    _serving("H 8, K 4, D 256, softcap, window 4096", 8, 4, 256, softcap=50.0, window=4096),
    _serving("H 8, K 4, D 256, float8 per token", 8, 4, 256, cache_dtype=_FP8, scale_per_token=True),
    _serving("H 64, K 8, D 64, sinks, window 128", 64, 8, 64, sinks=True, window=128),
)
