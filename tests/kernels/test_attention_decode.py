"""Decode attention beyond parity: the batch does not matter, workspaces are left clean, errors are told."""

from typing import Any

import pytest
import torch
from tolerances import assert_kernel_close

from halimede.errors import KernelError
from halimede.kernels.attention import paged_attention_reference
from halimede.kernels.gpu import attention_decode
from halimede.kernels.gpu.attention_cases import make_step
from halimede.kernels.gpu.attention_decode import paged_attention_decode
from halimede.kernels.gpu.attention_decode_plan import (
    DecodePlan,
    decode_workspace,
    default_split_size,
    max_splits,
    plan_decode,
)
from halimede.kernels.target import TARGETS

SIZES = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
LONGEST = 100
ROWS = ((1, 70), (1, 5), (1, 33))


def _step(rows: tuple[tuple[int, int], ...] = ROWS, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    return make_step(torch.device("cpu"), rows, heads=4, kv_heads=2, head_dim=32, **options)


def _plan(step: dict[str, Any], **options: Any) -> DecodePlan:
    given = {**SIZES, "max_seq_len": LONGEST, "sliding_window": None, "split_size": 32} | options
    return plan_decode(step["query_start_loc"], step["seq_lens"], **given)


def _decode(step: dict[str, Any], plan: DecodePlan, **options: Any) -> torch.Tensor:
    out = torch.full_like(step["q"], torch.nan, memory_format=torch.contiguous_format)
    paged_attention_decode(plan=plan, out=out, **{**step, "sliding_window": plan.sliding_window} | options)
    return out


def _alone(step: dict[str, Any], row: int) -> dict[str, Any]:
    """The step with one of its rows only."""
    start = int(step["query_start_loc"][row])
    return {
        **step,
        "q": step["q"][start : start + 1],
        "block_tables": step["block_tables"][row : row + 1],
        "query_start_loc": torch.tensor([0, 1], dtype=torch.int32),
        "seq_lens": step["seq_lens"][row : row + 1],
    }


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(cache_dtype: torch.dtype, window: int | None) -> None:
    step = _step(((1, 70), (0, 4), (1, 5), (3, 20), (1, 33)), cache_dtype=cache_dtype)
    together = _decode(step, _plan(step, sliding_window=window))
    for row in (0, 2, 4):
        alone = _alone(step, row)
        start = int(step["query_start_loc"][row])
        assert torch.equal(_decode(alone, _plan(alone, sliding_window=window))[0], together[start])


def test_a_plan_serves_twice_and_a_workspace_several_plans() -> None:
    workspace = decode_workspace(4, max_seq_len=LONGEST, device=torch.device("cpu"), split_size=16, **SIZES)
    step = _step(sinks=True)
    for window in (None, 20):
        plan = _plan(step, split_size=16, sliding_window=window, workspace=workspace)
        assert plan.workspace is workspace
        first, second = _decode(step, plan), _decode(step, plan)
        assert torch.equal(first, second)
        assert not workspace.counters.any()


def test_split_sizes_agree() -> None:
    step = _step(dtype=torch.float32, sinks=True)
    expected = paged_attention_reference(**step, sliding_window=50)
    for split_size in (16, 32, 64, 128):
        actual = _decode(step, _plan(step, split_size=split_size, sliding_window=50))
        assert_kernel_close(actual, expected, "attention decode")


def test_tokens_of_rows_that_do_not_decode_are_left_alone() -> None:
    step = _step(((4, 9), (1, 40), (2, 2), (1, 3)))
    out = _decode(step, _plan(step))
    assert out[[0, 1, 2, 3, 5, 6]].isnan().all()
    assert_kernel_close(out[[4, 7]], paged_attention_reference(**step)[[4, 7]], "attention decode")


def test_large_queries_over_a_cache_of_8_bits() -> None:
    """Their products are in float16, whose largest number is 65504."""
    step = _step(cache_dtype=torch.int8)
    step["q"] = step["q"] * 2.0**20
    step["scale"] = step["scale"] * 2.0**-20
    assert_kernel_close(_decode(step, _plan(step)), paged_attention_reference(**step), "attention decode")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_small_weights_beside_a_large_one_count(dtype: torch.dtype) -> None:
    """Scales of each token are small, and so are the weights of all tokens but the first."""
    step = _step(((1, 100),), cache_dtype=torch.int8, scale_per_token=True, dtype=dtype)
    step["v_scale"] = step["v_scale"] / 30
    step["q"][:] = 1
    step["k_cache"][:] = 0
    first = int(step["block_tables"][0, 0])
    step["k_cache"][first, :, 0] = 127
    step["k_scale"][first, :, 0] = 8.0 / 127 / 32 / step["scale"]
    actual, expected = _decode(step, _plan(step)).float(), paged_attention_reference(**step).float()
    assert (actual - expected).norm() < 6e-3 * expected.norm()


@pytest.mark.parametrize(("head_dim", "cache_dtype"), [(64, torch.bfloat16), (192, torch.int8)])
@pytest.mark.parametrize("target", ["sm_86", "gfx942", "gfx1100"])
def test_choices_of_other_targets_are_right(
    monkeypatch: pytest.MonkeyPatch, target: str, head_dim: int, cache_dtype: torch.dtype
) -> None:
    heuristic = attention_decode.heuristic
    monkeypatch.setattr(attention_decode, "heuristic", lambda _, *rest: heuristic(TARGETS[target], *rest))
    monkeypatch.setattr(attention_decode, "_variant", attention_decode._variant.__wrapped__)  # not cached
    torch.manual_seed(0)
    sizes = {"num_heads": 2, "num_kv_heads": 1, "head_dim": head_dim}
    shapes = {"heads": 2, "kv_heads": 1, "head_dim": head_dim, "cache_dtype": cache_dtype}
    step = make_step(torch.device("cpu"), ((1, 43), (1, 9)), **shapes)
    assert_kernel_close(
        _decode(step, _plan(step, **sizes)), paged_attention_reference(**step), "attention decode"
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"q": torch.zeros(3, 4, 16)}, "out must be contiguous"),
        ({"q": torch.zeros(3, 4, 32, dtype=torch.float64)}, "takes q"),
        ({"k_cache": torch.zeros(3, 2, 16, 32, dtype=torch.bfloat16)}, "contiguous caches"),
        ({"seq_lens": torch.zeros(3, dtype=torch.int64)}, "seq_lens must be int32"),
        ({"block_tables": torch.zeros(2, 4, dtype=torch.int32)}, "block_tables must be int32"),
        ({"sliding_window": 7}, "make a plan"),
        ({"sinks": torch.zeros(3)}, "sinks must be"),
        ({"sinks": torch.zeros(4, 2)[:, 0]}, "not contiguous"),
        ({"k_scale": torch.ones(1), "v_scale": torch.ones(1)}, "k_scale and v_scale"),
    ],
)
def test_what_the_kernel_does_not_take_is_an_error(change: dict[str, Any], told: str) -> None:
    step = _step()
    plan, out = _plan(step), torch.empty(3, 4, 32, dtype=torch.bfloat16)
    with pytest.raises(KernelError, match=told):
        paged_attention_decode(plan=plan, out=out, **{**step, **change})


def test_a_plan_refuses_what_does_not_fit() -> None:
    step = _step()
    small = decode_workspace(2, max_seq_len=LONGEST, device=torch.device("cpu"), split_size=32, **SIZES)
    for options in ({"split_size": 24}, {"split_size": 8}, {"sliding_window": 0}, {"workspace": small}):
        with pytest.raises(KernelError):
            _plan(step, **options)
    with pytest.raises(KernelError, match="query_start_loc"):
        _plan({**step, "query_start_loc": step["query_start_loc"][1:]})


def test_sizes_of_splits() -> None:
    assert [default_split_size(n) for n in (1, 8192, 40_000, 131_072, 1 << 20)] == [256, 256, 512, 1024, 2048]
    assert max_splits(100, 32, None) == 4
    assert [max_splits(1000, 32, window) for window in (1, 2, 33, 34, 5000)] == [1, 2, 2, 3, 32]
