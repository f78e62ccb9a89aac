"""Every architecture and option against transformers, whole, in chunks, token by token and batched."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import (
    VARIANTS,
    VOCAB_SIZE,
    RowInput,
    greedy_reference,
    load_model,
    make_kv_caches,
    make_model_input,
    reference_logits,
    run_model,
    write_tiny_checkpoint,
    write_variant,
)
from tolerances import MODEL_LOGITS

from halimede.engine.model_input import OutputRows
from halimede.engine.models.base import CausalLM
from halimede.engine.models.registry import SUPPORTED_ARCHITECTURES

LENGTH = 75  # more than four blocks, and more than yarn's and llama3's trained context of 64


def _tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (count,), generator=generator).tolist()


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_variant(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> CausalLM:
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> torch.Tensor:
    return reference_logits(checkpoint, _tokens(LENGTH))


def _assert_logits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=MODEL_LOGITS[0], atol=MODEL_LOGITS[1])


@pytest.mark.parametrize(
    ("chunk_size", "block_size"), [(None, 16), (1, 32), (2, 16), (16, 16), (16, 32), (23, 32)]
)
def test_logits_equal_transformers(
    model: CausalLM, expected: torch.Tensor, chunk_size: int | None, block_size: int
) -> None:
    logits = run_model(model, _tokens(LENGTH), chunk_size=chunk_size, block_size=block_size)
    _assert_logits(logits, expected)


def test_a_batch_of_ragged_rows_equals_each_row_alone(model: CausalLM, expected: torch.Tensor) -> None:
    """Step 1 prefills two rows; step 2 decodes one, goes on with the other and starts a third."""
    tokens, other = _tokens(LENGTH), _tokens(30, seed=1)
    tables = [[5, 1, 9, 3, 7], [2, 8], [4]]
    kv_caches = make_kv_caches(model, 10, 16, float("nan"))
    first = [RowInput(tokens[:40], 0, tables[0]), RowInput(other[:29], 0, tables[1])]
    second = [
        RowInput(other[29:], 29, tables[1]),
        RowInput(tokens[40:], 40, tables[0]),
        RowInput(tokens[:1], 0, tables[2]),
    ]
    with torch.inference_mode():
        one, two = (
            model.compute_logits(model(make_model_input(step, 16), kv_caches)) for step in (first, second)
        )
    alone = run_model(model, other)
    _assert_logits(torch.cat((one[:40], two[1:36])), expected)
    _assert_logits(torch.cat((one[40:], two[:1])), alone)
    _assert_logits(two[36:], expected[:1])


def test_a_step_without_tokens_gives_no_hidden_states(model: CausalLM) -> None:
    kv_caches = make_kv_caches(model, 2, 16)
    assert model(make_model_input([], 16), kv_caches).shape == (0, model.config.hidden_size)


def test_greedy_tokens_equal_transformers(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path, "LlamaForCausalLM", seed=3)
    model, tokens = load_model(path), _tokens(5)
    for _ in range(20):
        tokens.append(int(run_model(model, tokens, chunk_size=7)[-1].argmax()))
    generated = tokens[5:]
    assert generated == greedy_reference(path, tokens[:5], 20)
    assert len(set(generated)) > 8, "the checkpoint repeats itself, so this test would miss mistakes"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    path, tokens = write_tiny_checkpoint(tmp_path, "Qwen3ForCausalLM"), _tokens(40)
    exact = reference_logits(path, tokens)
    logits = run_model(load_model(path, dtype=dtype), tokens, chunk_size=11)
    error = (logits - exact).norm() / exact.norm()
    assert 0 < error < (0.03 if dtype == torch.bfloat16 else 0.004)


def test_bfloat16_is_as_near_to_float32_as_transformers_is(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path, tokens = write_tiny_checkpoint(tmp_path, "LlamaForCausalLM"), _tokens(60)
    exact = reference_logits(path, tokens)
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)(torch.tensor([tokens]))
    ours = run_model(load_model(path, dtype=torch.bfloat16), tokens)
    assert (ours - exact).norm() < 1.2 * (theirs.logits[0].float() - exact).norm()


def test_gemma3_in_bfloat16_is_as_near_to_float32_as_transformers_is(tmp_path: Path) -> None:
    """Norm weights of one and a little, kept in float32, and an embedding scale rounded as theirs is."""
    from transformers import AutoModelForCausalLM

    path, tokens = write_variant(tmp_path, "gemma3"), _tokens(60)
    exact = reference_logits(path, tokens)
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)(torch.tensor([tokens]))
    model = load_model(path, dtype=torch.bfloat16)
    kinds = {name: p.dtype for name, p in model.named_parameters() if name.endswith("norm.weight")}
    assert set(kinds.values()) == {torch.float32}
    assert len(kinds) == 3 * 6 + 1
    assert (run_model(model, tokens) - exact).norm() < 1.2 * (theirs.logits[0].float() - exact).norm()


def test_the_window_of_a_variant_matters(tmp_path: Path) -> None:
    """Otherwise the sliding window variants would test nothing."""
    tokens = _tokens(40)
    with_window = write_tiny_checkpoint(tmp_path / "a", "MistralForCausalLM", sliding_window=8)
    without = write_tiny_checkpoint(tmp_path / "b", "MistralForCausalLM", sliding_window=None)
    one, other = reference_logits(with_window, tokens), reference_logits(without, tokens)
    assert (one[:8] - other[:8]).abs().max() < 1e-4
    assert (one[8:] - other[8:]).abs().max() > 0.1


def test_every_architecture_has_a_variant() -> None:
    assert {architecture for architecture, _ in VARIANTS.values()} == set(SUPPORTED_ARCHITECTURES)


@pytest.mark.parametrize("sampled", [(), (1,), (0, 2), (0, 1, 2, 3)])
def test_the_last_layer_runs_for_the_rows_that_sample(model: CausalLM, sampled: tuple[int, ...]) -> None:
    """Their hidden states are those of a run that gives all, and the caches are the same."""
    rows = [
        RowInput(_tokens(20), 0, [3, 1]),
        RowInput(_tokens(33, seed=1), 0, [4, 2, 7]),
        RowInput(_tokens(1, seed=2), 0, [5]),
        RowInput(_tokens(9, seed=3), 0, [6]),
    ]
    whole = make_model_input(rows, 16)
    last = torch.tensor([sum(len(r.token_ids) for r in rows[: row + 1]) - 1 for row in sampled]).long()
    attn = whole.attn
    outputs = OutputRows(
        attn.block_tables[list(sampled)],
        torch.arange(len(sampled) + 1, dtype=torch.int32),
        attn.seq_lens[list(sampled)],
    )
    caches = [make_kv_caches(model, 8, 16) for _ in range(2)]
    with torch.inference_mode():
        expected = model(whole, caches[0])[last]
        actual = model(replace(whole, logits_indices=last, outputs=outputs), caches[1])
    assert actual.shape == (len(sampled), model.config.hidden_size)
    _assert_logits(actual, expected)
    for (k, v, *_), (other_k, other_v, *_) in zip(*caches, strict=True):
        assert torch.equal(k, other_k)
        assert torch.equal(v, other_v)


def test_single_tokens_of_which_some_sample(model: CausalLM) -> None:
    """A step that is recorded as decoding gives the same rows."""
    rows = [RowInput(_tokens(1, seed=i), 0, [i + 1]) for i in range(3)]
    whole = make_model_input(rows, 16)
    last = torch.tensor([0, 2])
    attn = whole.attn
    outputs = OutputRows(attn.block_tables[last], torch.arange(3, dtype=torch.int32), attn.seq_lens[last])
    with torch.inference_mode():
        expected = model(whole, make_kv_caches(model, 4, 16))[last]
        step = replace(whole, logits_indices=last, outputs=outputs)
        _assert_logits(model(step, make_kv_caches(model, 4, 16)), expected)
