"""Every way to read the paged cache against one oracle; xformers is replaced by what its masks mean."""

from typing import Any

import pytest
import torch
from tolerances import assert_kernel_close

from halimede.engine.layers.attention_gpu import PagedAttention, PagedRows, TorchAttention, TritonAttention
from halimede.engine.layers.attention_xformers import XformersAttention
from halimede.engine.model_input import KVCache
from halimede.kernels.attention import paged_attention_reference
from halimede.kernels.gpu.attention_cases import ROWS, make_step

CPU = torch.device("cpu")


def attend(attention: PagedAttention, step: dict[str, Any], window: int | None) -> torch.Tensor:
    counts = step["query_start_loc"].diff()
    rows = PagedRows(
        step["block_tables"],
        step["query_start_loc"],
        step["seq_lens"],
        max_query_len=int(counts.max()) if len(counts) else 0,
        max_seq_len=int(step["seq_lens"].max()) if len(counts) else 0,
        num_decode_rows=int((counts == 1).sum()),
    )
    cache = KVCache(step["k_cache"], step["v_cache"], step.get("k_scale"), step.get("v_scale"))
    prepared = attention.prepare(rows, cache, step["q"].shape[1], window)
    return prepared(step["q"], cache, step["scale"])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", ["triton", "torch"])
def test_ours(kind: str, rows: str, window: int | None) -> None:
    torch.manual_seed(0)
    attention: PagedAttention = TritonAttention(64, 16) if kind == "triton" else TorchAttention()
    step = make_step(CPU, ROWS[rows], heads=4, kv_heads=2, head_dim=16, dtype=torch.float32)
    output = attend(attention, step, window)
    assert_kernel_close(output, paged_attention_reference(**step, sliding_window=window), "attention")


class _MeaningOfXformers:
    """memory_efficient_attention_forward by its documentation: softmax(q k^T * scale + bias) v."""

    def __init__(self) -> None:
        from xformers.ops import fmha

        self.attn_bias, self.triton_splitk, self.biases = fmha.attn_bias, fmha.triton_splitk, []

    def memory_efficient_attention_forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any, *, scale: float, op: Any = None
    ) -> torch.Tensor:
        self.biases.append(type(bias).__name__)
        mask = bias.materialize((q.shape[1], bias.k_seqinfo.seqstart_py[-1]))
        mask = torch.nn.functional.pad(mask, (0, k.shape[1] - mask.shape[1]), value=-torch.inf)
        scores = torch.einsum("bmghd,bnghd->bghmn", q, k) * scale
        weights = scores.masked_fill(mask == -torch.inf, -torch.inf).softmax(-1)
        return torch.einsum("bghmn,bnghd->bmghd", weights, v.nan_to_num(0.0))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("rows", ROWS)
def test_xformers(rows: str, block_size: int, window: int | None) -> None:
    pytest.importorskip("xformers")
    torch.manual_seed(0)
    step = make_step(
        CPU, ROWS[rows], heads=6, kv_heads=2, head_dim=16, block_size=block_size, dtype=torch.float32
    )
    attention = XformersAttention()
    attention._fmha = meaning = _MeaningOfXformers()
    output = attend(attention, step, window)
    assert_kernel_close(output, paged_attention_reference(**step, sliding_window=window), "attention")
    if rows in ("decode", "one token"):
        paged = window is None and block_size == 64
        assert meaning.biases == [
            "PagedBlockDiagonalPaddedKeysMask"
            if paged
            else "BlockDiagonalCausalFromBottomRightMask"
            if window is None
            else "BlockDiagonalCausalLocalAttentionFromBottomRightMask"
        ]
