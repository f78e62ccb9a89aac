"""paged_attention against its reference: ragged rows, scattered blocks, windows, NaN in unwritten slots."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from tolerances import assert_kernel_close

from halimede.kernels import attention_plan
from halimede.kernels.attention import paged_attention, paged_attention_reference
from halimede.kernels.attention_plan import plan_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Step:
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor

    def run(self, window: int | None = None, scale: float = 0.25) -> torch.Tensor:
        plan = plan_attention(
            self.block_tables,
            self.query_start_loc,
            self.seq_lens,
            num_heads=self.q.shape[1],
            k_cache=self.k_cache,
            sliding_window=window,
        )
        return paged_attention(self.q, self.k_cache, self.v_cache, plan, scale)

    def reference(self, window: int | None = None, scale: float = 0.25) -> torch.Tensor:
        return paged_attention_reference(
            self.q,
            self.k_cache,
            self.v_cache,
            self.block_tables,
            self.query_start_loc,
            self.seq_lens,
            scale=scale,
            sliding_window=window,
        )


def make_step(
    rows: Sequence[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    q_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Step:
    """rows: (query tokens, sequence length) of each. Blocks are shuffled; unused slots and blocks are NaN."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-seq_len // block_size) for _, seq_len in rows]
    num_blocks, width = sum(needed) + 5, max(needed, default=0) + 2
    free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    shape = (num_blocks, kv_heads, block_size, head_dim)
    k_cache, v_cache = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
    block_tables = torch.zeros(len(rows), width, dtype=torch.int32)
    for row, (count, (_, seq_len)) in enumerate(zip(needed, rows, strict=True)):
        for i in range(count):
            block, used = free.pop(), min(block_size, seq_len - i * block_size)
            block_tables[row, i] = block
            for cache in (k_cache, v_cache):
                cache[block, :, :used] = torch.randn(kv_heads, used, head_dim, generator=generator).to(dtype)
    counts = torch.tensor([0, *(count for count, _ in rows)], dtype=torch.int32)
    starts = counts.cumsum(0, dtype=torch.int32)
    # q is a slice of a fused projection.
    q = torch.randn(int(starts[-1]), heads + 3, head_dim, generator=generator).to(q_dtype or dtype)[:, :heads]
    seq_lens = torch.tensor([seq_len for _, seq_len in rows], dtype=torch.int32)
    return Step(q, k_cache, v_cache, block_tables, starts, seq_lens)


ROWS = {
    "one token": [(1, 1)],
    "decode": [(1, 1), (1, 16), (1, 17), (1, 45), (1, 3)],
    "one prompt": [(37, 37)],
    "prompts": [(5, 5), (16, 16), (33, 33), (2, 2)],
    "chunks with context": [(7, 40), (16, 32), (2, 17), (20, 21)],
    "mixed": [(1, 9), (11, 11), (1, 50), (6, 30), (1, 1), (3, 3)],
    "rows without tokens": [(0, 4), (1, 9), (0, 0), (4, 8)],
    "no tokens": [(0, 5)],
    "no rows": [],
}


@pytest.mark.parametrize("window", [None, 1, 5, 16, 1000])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_rows_of_every_kind(rows: list[tuple[int, int]], block_size: int, window: int | None) -> None:
    step = make_step(rows, block_size=block_size)
    output = step.run(window)
    assert output.is_contiguous()
    assert_kernel_close(output, step.reference(window), "attention")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (4, 2), (9, 3), (8, 1), (5, 1), (14, 2)])
@pytest.mark.parametrize("head_dim", [8, 24, 64])
def test_head_groups_and_dtypes(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    step = make_step(ROWS["mixed"], heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    scale = head_dim**-0.5
    assert_kernel_close(step.run(None, scale), step.reference(None, scale), "attention")
    assert_kernel_close(step.run(7, scale), step.reference(7, scale), "attention")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [ROWS["decode"], ROWS["mixed"], [(1, 45)]], ids=["decode", "mixed", "one"])
def test_queries_wider_than_the_cache(rows: list[tuple[int, int]], dtype: torch.dtype) -> None:
    step = make_step(rows, heads=6, dtype=dtype, q_dtype=torch.float32)
    for window in (None, 7):
        output = step.run(window)
        assert output.dtype == torch.float32
        # Only decoding of several rows rounds anything: the weights.
        op = "attention" if len(rows) == 1 else f"attention over {dtype}"
        assert_kernel_close(output, step.reference(window), op)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_contexts_sum_in_float32(dtype: torch.dtype) -> None:
    step = make_step([(1, 3000), (1, 20), (4, 2000)], heads=2, kv_heads=1, head_dim=64, dtype=dtype)
    assert_kernel_close(step.run(None, 0.01), step.reference(None, 0.01), "attention")


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("limit", [1, 300, 2000])
def test_splitting_into_batches_and_tiles_changes_nothing(
    limit: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = make_step([(1, 9), (60, 60), (1, 50), (25, 90), (1, 1), (1, 33)])
    monkeypatch.setattr(attention_plan, "_MAX_BATCH_ELEMENTS", limit * 32)
    monkeypatch.setattr(attention_plan, "_MAX_TILE_SCORES", limit)
    assert_kernel_close(step.run(window), step.reference(window), "attention")


def test_decode_rows_go_together_and_prefill_tiles_are_bounded() -> None:
    step = make_step([(1, 9), (1, 50), (6, 30), (1, 1)])
    plan = plan_attention(
        step.block_tables, step.query_start_loc, step.seq_lens, num_heads=4, k_cache=step.k_cache
    )
    assert len(plan.decode) == 1
    assert plan.decode[0].tokens is not None
    assert plan.decode[0].tokens.tolist() == [0, 1, 8]
    assert len(plan.prefill) == 1
    cache = torch.empty(600, 1, 16, 4)
    tables = torch.arange(600, dtype=torch.int32)[None]
    long = plan_attention(tables, torch.tensor([0, 8192]), torch.tensor([8192]), num_heads=1, k_cache=cache)
    tiles = long.prefill[0].tiles
    assert [tiles[0].start, tiles[-1].stop] == [0, 8192]
    assert all((tile.stop - tile.start) * (tile.last_key - tile.first_key) <= 1 << 22 for tile in tiles)


def test_a_window_reads_no_more_than_it_sees() -> None:
    step = make_step([(1, 90), (10, 90)])
    plan = plan_attention(
        step.block_tables,
        step.query_start_loc,
        step.seq_lens,
        num_heads=4,
        k_cache=step.k_cache,
        sliding_window=8,
    )
    assert plan.decode[0].cache_rows.shape == (2 * 8,)
    assert plan.prefill[0].cache_rows.shape == (2 * 17,)


def test_runs_under_inference_mode_and_leaves_the_caches_alone() -> None:
    step = make_step(ROWS["mixed"])
    before = step.k_cache.clone(), step.v_cache.clone()
    with torch.inference_mode():
        output = step.run()
    assert_kernel_close(output, step.reference(), "attention")
    torch.testing.assert_close((step.k_cache, step.v_cache), before, rtol=0, atol=0, equal_nan=True)


def test_wrong_shapes_are_refused() -> None:
    step = make_step([(4, 4)])
    plan = plan_attention(
        step.block_tables, step.query_start_loc, step.seq_lens, num_heads=4, k_cache=step.k_cache
    )
    with pytest.raises(AssertionError, match="do not share"):
        paged_attention(step.q[:, :3], step.k_cache, step.v_cache, plan, 1.0)
    with pytest.raises(AssertionError, match="head_dim"):
        paged_attention(step.q[..., :8], step.k_cache, step.v_cache, plan, 1.0)
    with pytest.raises(AssertionError, match="only 2 long"):
        plan_attention(
            step.block_tables, step.query_start_loc, torch.tensor([2]), num_heads=4, k_cache=step.k_cache
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "fault", ["one key too few", "window off by one", "scale", "head order", "next block"]
)
def test_a_broken_attention_is_noticed(fault: str, dtype: torch.dtype) -> None:
    rows = [(1, 40), (1, 25), (8, 40)]
    step = make_step(rows, dtype=dtype, heads=8)
    expected = step.reference(16)
    if fault == "one key too few":
        fewer = Step(
            step.q, step.k_cache, step.v_cache, step.block_tables, step.query_start_loc, step.seq_lens - 1
        )
        broken = fewer.run(15)
    elif fault == "window off by one":
        broken = step.run(17)
    elif fault == "scale":
        broken = step.run(16, 0.28)
    elif fault == "head order":
        broken = step.run(16).view(-1, 2, 4, 16).transpose(1, 2).reshape(expected.shape)
    else:
        tables = step.block_tables.clone()
        tables[:, [0, 1]] = tables[:, [1, 0]]
        broken = Step(step.q, step.k_cache, step.v_cache, tables, step.query_start_loc, step.seq_lens).run(16)
    with pytest.raises(AssertionError):
        assert_kernel_close(broken, expected, "attention")
