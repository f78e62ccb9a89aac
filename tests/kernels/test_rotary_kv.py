"""Norm, rotary embedding and KV write in one kernel: against the torch path, and what it must leave alone."""

from typing import Any

import pytest
import torch
from tolerances import assert_kernel_close

from halimede.engine.layers.rope_config import RopeConfig
from halimede.engine.layers.rotary import RotaryEmbedding
from halimede.errors import KernelError
from halimede.kernels.gpu import rotary_kv
from halimede.kernels.gpu.rotary_kv import qk_norm_rotary_kv_write
from halimede.kernels.gpu.rotary_kv_cases import make_tokens, qk_norm_rotary_kv_write_reference
from halimede.kernels.kv_cache import cache_rows, write_kv
from halimede.kernels.norm import rms_norm
from halimede.kernels.rotary import apply_rotary, rotary_factors
from halimede.kernels.target import TARGETS

CPU = torch.device("cpu")
BF16, FP32, E4M3, INT8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8
ROPES = {
    "default": RopeConfig("default", 1e4, 16),
    "partial": RopeConfig("default", 1e4, 8),
    "linear": RopeConfig("linear", 1e4, 16, factor=4.0),
    "llama3": RopeConfig("llama3", 5e5, 16, factor=8.0, original_max_position_embeddings=32),
    "yarn": RopeConfig("yarn", 1e4, 16, factor=4.0, original_max_position_embeddings=32),
    "factors": RopeConfig("factors", 1e4, 8, factors=(1.0, 1.5, 2.0, 4.0)),
}


def _clone(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in given.items()}


def _torch_path(given: dict[str, Any], rope: RotaryEmbedding) -> tuple[torch.Tensor, ...]:
    """What engine/layers/attention.py does on a CPU: q, and both caches."""
    heads, kv_heads = given["num_heads"], given["num_kv_heads"]
    q, k, v = given["qkv"].split([heads, kv_heads, kv_heads], dim=1)
    if "q_weight" in given:
        q, k = rms_norm(q, given["q_weight"], given["eps"]), rms_norm(k, given["k_weight"], given["eps"])
    factors = rotary_factors(*rope(given["positions"]))
    apply_rotary(q, factors)
    apply_rotary(k, factors)
    caches = given["k_cache"].zero_(), given["v_cache"].zero_()
    rows = cache_rows(given["slot_mapping"][:, None], kv_heads, caches[0].shape[2]).flatten()
    write_kv(k, v, *caches, rows)
    return q, *caches


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", ROPES)
def test_it_does_what_the_torch_path_does(name: str, norm: bool) -> None:
    torch.manual_seed(0)
    rope = RotaryEmbedding(ROPES[name])
    rope.prepare(CPU, 256)
    given = make_tokens(
        CPU, 9, (4, 2), 16, dtype=FP32, weight_dtype=FP32 if norm else None, max_positions=256
    )
    given["cos"], given["sin"] = rope.tables
    expected = _torch_path(_clone(given), rope)
    given["k_cache"].zero_()
    given["v_cache"].zero_()
    qk_norm_rotary_kv_write(**given)
    for ours, theirs in zip((given["qkv"][:, :4], given["k_cache"], given["v_cache"]), expected, strict=True):
        assert_kernel_close(ours, theirs, "rotary_kv")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("cache_dtype", [BF16, E4M3, INT8])
def test_only_the_slots_of_tokens_are_written(cache_dtype: torch.dtype, interleaved: bool) -> None:
    torch.manual_seed(1)
    eight_bits = cache_dtype.itemsize == 1
    given = make_tokens(
        CPU,
        7,
        (2, 2),
        24,
        cache_dtype=cache_dtype,
        scale_per_head=eight_bits,
        padding=3,
        interleaved=interleaved,
    )
    given["slot_mapping"][2] = -17
    before = _clone(given)
    qk_norm_rotary_kv_write(**given)
    slots = given["slot_mapping"][given["slot_mapping"] >= 0]
    expected = torch.zeros(given["k_cache"].shape[:3], dtype=torch.bool)
    expected[slots // 16, :, slots % 16] = True
    for name in ("k_cache", "v_cache"):
        poison = given[name] == -128 if cache_dtype == INT8 else given[name].float().isnan()
        assert torch.equal(~poison.any(-1), expected)
        assert torch.equal(poison.all(-1), ~expected)
    if eight_bits:
        assert torch.equal(~given["k_scale"].isnan(), expected)
        assert torch.equal(~given["v_scale"].isnan(), expected)
    assert torch.equal(given["qkv"][:, 2:], before["qkv"][:, 2:])
    assert not (given["qkv"][:, :2] == before["qkv"][:, :2]).all(-1).any(), "q of padding is turned too"


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("scale_per_head", [False, True])
@pytest.mark.parametrize("cache_dtype", [E4M3, INT8])
def test_values_of_8_bits_are_those_of_the_oracle(
    cache_dtype: torch.dtype, scale_per_head: bool, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sm_80 converts to float8 in integer arithmetic."""
    torch.manual_seed(2)
    monkeypatch.setattr(rotary_kv, "target_of", lambda tensor: TARGETS[target])
    given = make_tokens(
        CPU,
        12,
        (1, 3),
        80,
        dtype=FP32,
        cache_dtype=cache_dtype,
        scale_per_head=scale_per_head,
        weight_dtype=FP32,
    )
    expected = _clone(given)
    qk_norm_rotary_kv_write(**given)
    qk_norm_rotary_kv_write_reference(**expected)
    for name in ("k_cache", "v_cache"):
        ours, theirs = (x[name].view(torch.uint8) for x in (given, expected))
        # float32 and float64 may fall on two sides of a boundary.
        assert (ours != theirs).sum() <= 2
        assert ((ours.int() - theirs.int()).abs() <= 1).all()


@pytest.mark.parametrize(
    ("cache_dtype", "relative", "in_steps"),
    [(E4M3, 1 / 16, 2.0**-10), (INT8, 0.0, 0.5)],
    ids=["e4m3", "int8"],
)
def test_the_round_trip_through_8_bits_loses_half_a_step(
    cache_dtype: torch.dtype, relative: float, in_steps: float
) -> None:
    torch.manual_seed(3)
    given = make_tokens(CPU, 16, (1, 2), 64, dtype=FP32, cache_dtype=cache_dtype, scale_per_head=True)
    slots = given["slot_mapping"]
    v = given["qkv"][:, 3:].clone()
    qk_norm_rotary_kv_write(**given)
    stored = given["v_cache"][slots // 16, :, slots % 16].float()
    scale = given["v_scale"][slots // 16, :, slots % 16][..., None]
    assert ((stored * scale - v).abs() <= (relative * v.abs() + in_steps * scale) * (1 + 1e-5)).all()
    assert torch.equal(stored.abs().amax(-1), torch.full((16, 2), 127.0 if cache_dtype == INT8 else 448.0))


def test_a_head_of_zeros_has_a_scale_to_divide_by() -> None:
    given = make_tokens(CPU, 1, (1, 1), 16, cache_dtype=E4M3, scale_per_head=True)
    given["qkv"].zero_()
    qk_norm_rotary_kv_write(**given)
    slot = int(given["slot_mapping"])
    assert (given["k_cache"][slot // 16, :, slot % 16].float() == 0).all()
    assert (given["k_scale"][slot // 16, :, slot % 16] > 0).all()


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(4)
    given = make_tokens(CPU, 40, (3, 1), 80, weight_dtype=BF16, rotary_dim=32)
    alone = _clone(given)
    for name in ("qkv", "positions", "slot_mapping"):
        alone[name] = alone[name][29:30].clone()
    qk_norm_rotary_kv_write(**given)
    qk_norm_rotary_kv_write(**alone)
    slot = int(alone["slot_mapping"])
    assert torch.equal(given["qkv"][29], alone["qkv"][0])
    for name in ("k_cache", "v_cache"):
        place = slot // 16, slice(None), slot % 16
        assert torch.equal(given[name][place], alone[name][place])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"num_heads": 3}, "takes qkv"),
    "no third of them is dense": ({"qkv": torch.zeros(5, 16, 8, dtype=BF16).mT}, "takes qkv"),
    "dtype": ({"qkv": torch.zeros(5, 8, 16, dtype=torch.float64)}, "float32; it is torch.float64"),
    "int32 positions": ({"positions": torch.zeros(5, dtype=torch.int32)}, "int64 positions"),
    "too few slots": ({"slot_mapping": torch.zeros(4, dtype=torch.int64)}, "int64 slot_mapping"),
    "no sin": ({"sin": None}, "both of cos and sin"),
    "table of bfloat16": ({"cos": torch.zeros(64, 8, dtype=BF16)}, "float32 cos and sin"),
    "table too wide": ({"cos": torch.zeros(64, 9), "sin": torch.zeros(64, 9)}, "half at most 8"),
    "one weight": ({"q_weight": torch.zeros(16)}, "both norm weights"),
    "short weights": ({"q_weight": torch.zeros(8), "k_weight": torch.zeros(8)}, r"norm weights \(16\)"),
    "other KV heads": ({"num_heads": 2, "num_kv_heads": 3}, "takes contiguous caches"),
    "v cache of another type": ({"v_cache": torch.zeros(2, 2, 16, 16)}, "takes contiguous caches"),
    "a scale for bfloat16": ({"k_scale": torch.ones(1), "v_scale": torch.ones(1)}, "without scales"),
    "int8 without scales": (
        {"k_cache": torch.zeros(2, 2, 16, 16, dtype=INT8), "v_cache": torch.zeros(2, 2, 16, 16, dtype=INT8)},
        "float32 scales",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name: str) -> None:
    changes, message = WRONG[name]
    given = make_tokens(CPU, 5, (4, 2), 16) | changes
    with pytest.raises(KernelError, match=message):
        qk_norm_rotary_kv_write(**given)
