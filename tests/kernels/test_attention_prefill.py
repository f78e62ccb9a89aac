"""The prefill attention kernel beyond parity: prompts in chunks, rows left out, tiles of any size, errors."""

from typing import Any

import pytest
import torch
from kernel_parity import check_case

from halimede.errors import KernelError
from halimede.kernels.gpu import attention_prefill, attention_prefill_config
from halimede.kernels.gpu.attention_cases import make_step
from halimede.kernels.gpu.attention_prefill import SPECS, paged_attention_prefill
from halimede.kernels.spec import Case
from halimede.kernels.target import TARGETS, Target
from halimede.kernels.tuning import KernelConfig, next_power_of_2

SPEC = SPECS[0]
CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {"heads": 6, "kv_heads": 2, "head_dim": 32}
# What several tiles of 16 or 32 keys make different from one.
TILED = (
    "chunks with context",
    "mixed",
    "several tiles, float32",
    "group of 7",
    "head of 80, blocks of 128",
    "window over whole tiles",
    "gpt-oss",
    "softcap",
    "bidirectional, window",
    "int8 per token",
)


@pytest.mark.parametrize("chunk", [1, 5, 16, 36])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 9}, {"softcap": 3.0}], ids=str)
def test_a_prompt_in_chunks_gives_the_same_bits(
    chunk: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _use_tiles(monkeypatch, 32, 16)
    torch.manual_seed(0)
    step = make_step(CPU, ((37, 37),), **SHAPE) | options
    whole = _attend(step)
    parts = []
    for start in range(0, 37, chunk):
        stop = min(start + chunk, 37)
        part = {
            "q": step["q"][start:stop],
            "query_start_loc": torch.tensor([0, stop - start], dtype=torch.int32),
            "seq_lens": torch.tensor([stop], dtype=torch.int32),
        }
        parts.append(_attend(step | part, min_query_len=1))
    assert torch.equal(torch.cat(parts), whole)


def test_a_row_gives_the_same_bits_beside_others() -> None:
    torch.manual_seed(0)
    step = make_step(CPU, ((6, 20), (1, 9), (30, 40), (4, 70)), **SHAPE)
    together = _attend(step)
    alone = {
        "q": step["q"][37:],
        "block_tables": step["block_tables"][3:],
        "query_start_loc": torch.tensor([0, 4], dtype=torch.int32),
        "seq_lens": step["seq_lens"][3:],
    }
    assert torch.equal(_attend(step | alone), together[37:])


@pytest.mark.parametrize(("min_query_len", "untouched"), [(1, []), (2, [0, 5]), (4, [0, 5, 6, 7, 8])])
def test_rows_with_few_query_tokens_are_left_alone(min_query_len: int, untouched: list[int]) -> None:
    torch.manual_seed(0)
    step = make_step(CPU, ((1, 9), (4, 4), (1, 1), (3, 20)), **SHAPE)
    out = torch.full(step["q"].shape, 7.0, dtype=step["q"].dtype)
    paged_attention_prefill(out=out, min_query_len=min_query_len, **step)
    is_untouched = (out == 7).flatten(1).all(dim=1)
    assert is_untouched.nonzero().flatten().tolist() == untouched


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("tile", [(16, 16), (32, 32)], ids=str)
def test_tiles_of_any_size_give_the_reference(
    name: str, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _use_tiles(monkeypatch, *tile)
    check_case(SPEC, _case(name))


@pytest.mark.parametrize(("name", "parts"), [("head of 192", 3), ("Gemma", 2), ("Gemma", 4)])
def test_columns_may_be_cut_into_several_programs(
    name: str, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use_tiles(monkeypatch, 64, 32, parts)
    check_case(SPEC, _case(name))


@pytest.mark.parametrize("name", ["head of 192", "Gemma", "head of 96, e4m3 per token"])
def test_queries_may_be_read_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _use_tiles(monkeypatch, 64, 32, piece=32)
    check_case(SPEC, _case(name))


@pytest.mark.parametrize("target", TARGETS.values(), ids=str)
@pytest.mark.parametrize("head_dim", [16, 80, 192, 256])
def test_the_columns_of_every_choice_add_up(target: Target, head_dim: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        blocks = attention_prefill_config.default_config(target, dtype, dtype, head_dim, 16, True).blocks
        parts = blocks["V_PARTS"]
        assert parts == 1 or next_power_of_2(head_dim // parts) * parts == head_dim
        assert blocks["PIECE"] == 0 or head_dim % blocks["PIECE"] == 0


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"q": torch.zeros(7, 6, 32, dtype=torch.float64)}, "q must be"),
        ({"q": torch.zeros(7, 32, 6, dtype=torch.bfloat16).transpose(1, 2)}, "q must be"),
        ({"q": torch.zeros(7, 5, 32, dtype=torch.bfloat16)}, "5 heads cannot share 2 kv heads"),
        ({"q": torch.zeros(7, 6, 16, dtype=torch.bfloat16)}, "k_cache must be"),
        ({"out": torch.zeros(7, 6, 32)}, "out must be"),
        ({"v_cache": torch.zeros(3, 2, 16, 32)}, "v_cache must be"),
        ({"sinks": torch.zeros(2)}, "sinks must be"),
        ({"block_tables": torch.zeros(2, 3, dtype=torch.int64)}, "must be contiguous int32"),
        ({"block_tables": torch.zeros(3, 3, dtype=torch.int32)}, "block_tables must be"),
        ({"query_start_loc": torch.zeros(2, dtype=torch.int32)}, "query_start_loc must be"),
        ({"k_scale": torch.ones(1), "v_scale": torch.ones(1)}, "has no scales"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"sliding_window": 0}, "sliding_window must be"),
    ],
)
def test_what_the_kernel_does_not_take_is_an_error(change: dict[str, Any], fact: str) -> None:
    step = make_step(CPU, ((4, 9), (3, 3)), **SHAPE) | change
    step.setdefault("out", torch.empty_like(step["q"], memory_format=torch.contiguous_format))
    with pytest.raises(KernelError, match=fact):
        paged_attention_prefill(**step)


@pytest.mark.parametrize("scales", [{}, {"v_scale": torch.ones(2)}, {"v_scale": torch.ones(1).double()}])
def test_a_quantized_cache_needs_scales(scales: dict[str, torch.Tensor]) -> None:
    step = make_step(CPU, ((4, 9),), **SHAPE, cache_dtype=torch.int8)
    del step["v_scale"]
    with pytest.raises(KernelError, match="needs k_scale and v_scale"):
        paged_attention_prefill(out=torch.empty(4, 6, 32, dtype=torch.bfloat16), **step, **scales)


@pytest.mark.parametrize(("head_dim", "block_size"), [(24, 16), (512, 16), (112, 16), (32, 24), (32, 8)])
def test_sizes_that_the_kernel_does_not_take_are_errors(head_dim: int, block_size: int) -> None:
    step = make_step(CPU, ((2, 3),), heads=2, kv_heads=1, head_dim=head_dim, block_size=block_size)
    with pytest.raises(KernelError, match=r"head_dim|block_size"):
        _attend(step)


def _attend(step: dict[str, Any], min_query_len: int = 2) -> torch.Tensor:
    out = torch.zeros(step["q"].shape, dtype=step["q"].dtype)
    paged_attention_prefill(out=out, min_query_len=min_query_len, **step)
    return out


def _case(name: str) -> Case:
    return next(case for case in SPEC.cases if case.name == name)


def _use_tiles(
    monkeypatch: pytest.MonkeyPatch, block_m: int, block_n: int, v_parts: int = 1, piece: int = 0
) -> None:
    config = KernelConfig({"BLOCK_M": block_m, "BLOCK_N": block_n, "V_PARTS": v_parts, "PIECE": piece})
    monkeypatch.setattr(attention_prefill_config, "default_config", lambda *_: config)
    monkeypatch.setattr(attention_prefill, "_variant", attention_prefill._variant.__wrapped__)  # not cached
