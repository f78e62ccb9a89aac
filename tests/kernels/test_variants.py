"""Variants that launchers keep: a launch that finds one gets the kernel that a fresh process would choose.

On a GPU the loaded kernel is found by the variant itself, so what a launcher finds its variants by must tell
apart all that is compiled differently or refused. Here calls follow one another that differ in little.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch

from halimede.errors import KernelError
from halimede.kernels import tuning
from halimede.kernels.gpu import (
    activation,
    attention_decode,
    attention_decode_plan,
    attention_prefill,
    embedding,
    norm,
    rotary_kv,
)
from halimede.kernels.gpu.attention_cases import make_step
from halimede.kernels.gpu.rotary_kv_cases import make_tokens
from halimede.kernels.launch import Variant, intercepting
from halimede.kernels.specialise import specialise
from halimede.kernels.target import TARGETS, Target
from halimede.kernels.tuning import KernelConfig, pick_config, tuned_bucket

META = torch.device("meta")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
E4M3, INT8 = torch.float8_e4m3fn, torch.int8
# Kinds of warps, of registers and of conversions.
USED_TARGETS = tuple(TARGETS[name] for name in ("sm_80", "sm_90", "gfx942"))
Spoil = tuple[str, str] | None
# Options that add tensors, or checks of them.
_SPOILT = ("cache_dtype", "weight_dtype", "sinks")


def _spoilt(given: dict[str, Any], spoil: Spoil) -> dict[str, Any]:
    """spoil: the name of a tensor, if it is there, and what is done to it: most of this is refused."""
    if spoil is None or given.get(spoil[0]) is None:
        return given
    name, how = spoil
    tensor = given[name]
    if how == "strided":
        changed = tensor.new_empty((*tensor.shape, 2))[..., 0]
    elif how == "dense":
        changed = tensor.contiguous()
    elif how == "wide":
        changed = tensor.to(FP64 if tensor.is_floating_point() else torch.int64)
    elif how == "longer":
        changed = tensor.new_empty((tensor.shape[0] + 1, *tensor.shape[1:]))
    else:
        assert how == "missing"
        changed = None
    return {**given, name: changed}


def _spoils(hows: str, *names: str) -> tuple[Spoil, ...]:
    return (None, *itertools.product(names, hows.split()))


def _norm(*, rows: int, heads: int, size: int, gap: int, dtype: Any, weight: Any, add: bool) -> None:
    shape = (rows, heads, size) if heads else (rows, size)
    x = torch.empty(*shape[:-1], size + gap, dtype=dtype, device=META)[..., :size]
    scale = torch.empty(size, dtype=weight, device=META)
    if add:
        norm.add_rms_norm(x, x.contiguous(), scale, 1e-5)
    else:
        norm.rms_norm(x, scale, 1e-5)


def _activate(*, rows: int, size: int, gap: int, dtype: Any, kind: Any, gated: bool) -> None:
    x = torch.empty(rows, size + gap, dtype=dtype, device=META)[:, :size]
    activation.activate(x, kind, gated=gated)


def _embed(*, tokens: int, shape: Any, weight: Any, dtype: Any, scale: float, spoil: Spoil) -> None:
    given = {
        "input_ids": torch.empty(tokens, dtype=torch.int64, device=META),
        "weight": torch.empty(shape, dtype=weight, device=META),
    }
    embedding.embed(**_spoilt(given, spoil), scale=scale, dtype=dtype)


def _rotary(*, tokens: int, heads: Any, more: int, head_dim: int, spoil: Spoil, **options: Any) -> None:
    """more: heads than q, k and v have."""
    given = make_tokens(META, tokens, heads, head_dim, **options)
    given["num_heads"] += more
    rotary_kv.qk_norm_rotary_kv_write(**_spoilt(given, spoil))


def _plan(*, rows: int, split_size: int, window: int | None) -> None:
    lengths = torch.empty(2 * rows + 1, dtype=torch.int32, device=META)
    attention_decode_plan.plan_decode(
        lengths[: rows + 1],
        lengths[rows + 1 :],
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        max_seq_len=1000,
        sliding_window=window,
        split_size=split_size,
    )


def _decode(
    *, rows: int, split_size: int, window: int | None, planned: Any, softcap: Any, spoil: Spoil, **step: Any
) -> None:
    """planned: the head_dim of the plan, 0 for the right one."""
    given = make_step(META, ((1, 100),) * rows, **step)
    plan = attention_decode_plan.plan_decode(
        given["query_start_loc"],
        given["seq_lens"],
        num_heads=step["heads"],
        num_kv_heads=step["kv_heads"],
        head_dim=planned or step["head_dim"],
        max_seq_len=1000,
        sliding_window=window,
        split_size=split_size,
    )
    given["out"] = torch.empty(given["q"].shape, dtype=given["q"].dtype, device=META)
    given = _spoilt(given, spoil)
    attention_decode.paged_attention_decode(**given, plan=plan, sliding_window=window, softcap=softcap)


def _prefill(
    *, rows: int, window: int | None, softcap: float | None, causal: bool, spoil: Spoil, **step: Any
) -> None:
    given = make_step(META, ((7, 100),) * rows, **step)
    given["out"] = torch.empty(given["q"].shape, dtype=given["q"].dtype, device=META)
    options = {"sliding_window": window, "softcap": softcap, "causal": causal}
    attention_prefill.paged_attention_prefill(**_spoilt(given, spoil), **options)


_STEP: dict[str, tuple[Any, ...]] = {
    "rows": (3, 2),
    "heads": (4, 8),
    "kv_heads": (2, 4, 3),
    "head_dim": (64, 128, 96, 8),
    "block_size": (16, 128),
    "dtype": (BF16, FP16, FP32),
    "cache_dtype": (None, E4M3, INT8, FP16),
    "scale_per_token": (False, True),
    "sinks": (False, True),
    "window": (None, 40, 50),
    "softcap": (None, 3.0, 4.0),
    "spoil": (
        *_spoils("strided dense wide", "q", "out"),
        *_spoils("strided wide longer", "k_cache", "v_cache", "k_scale", "v_scale", "sinks")[1:],
        *_spoils("wide longer", "query_start_loc", "seq_lens", "block_tables")[1:],
        ("k_scale", "missing"),
    ),
}


@dataclass(frozen=True)
class Launcher:
    """One with variants. call: makes arguments and launches. varied: values of each of call's options, the
    first in most calls. unseen: arguments of `_variant`, by number, that change nothing here.
    """

    module: ModuleType
    call: Callable[..., None]
    varied: Mapping[str, tuple[Any, ...]]
    unseen: tuple[int, ...] = ()

    def calls(self) -> Iterator[tuple[Target, dict[str, Any]]]:
        """Targets and options: those that differ from the first in none, one or, for one target, two."""
        first = {name: values[0] for name, values in self.varied.items()}
        changes = [(name, value) for name, values in self.varied.items() for value in values[1:]]
        for target in USED_TARGETS:
            yield target, first
            for name, value in changes:
                yield target, {**first, name: value}
        for (name, value), (other, other_value) in itertools.combinations(changes, 2):
            if name != other and (other != "spoil" or name in _SPOILT):
                yield target, {**first, name: value, other: other_value}


LAUNCHERS = {
    "norm": Launcher(
        norm,
        _norm,
        {
            "rows": (3, 1),
            "heads": (0, 2, 4),
            "size": (64, 128, 100),
            "gap": (0, 8, 3),
            "dtype": (BF16, FP16, FP32),
            "weight": (BF16, FP32),
            "add": (False, True),
        },
    ),
    "activate": Launcher(
        activation,
        _activate,
        {
            "rows": (3, 1),
            "size": (256, 512, 4096, 100, 3),
            "gap": (0, 8, 3),
            "dtype": (BF16, FP16, FP32),
            "kind": ("silu", "gelu", "gelu_tanh", "relu2", "tanh"),
            "gated": (True, False),
        },
    ),
    "embed": Launcher(
        embedding,
        _embed,
        {
            "tokens": (3, 2),
            "shape": ((50, 64), (60, 64), (50, 4096), (50,)),
            "weight": (BF16, FP16, FP32, FP64),
            "dtype": (None, BF16, FP32, INT8),
            "scale": (1.0, 2.0),
            "spoil": (*_spoils("strided", "input_ids", "weight"), ("input_ids", "wide")),
        },
    ),
    "rotary_kv": Launcher(
        rotary_kv,
        _rotary,
        {
            "tokens": (5, 4),
            "heads": ((4, 2), (8, 2), (4, 1)),
            "more": (0, 1),
            "head_dim": (64, 128),
            "rotary_dim": (None, 16, 0),
            "dtype": (BF16, FP16, FP32),
            "cache_dtype": (None, E4M3, INT8, FP32),
            "weight_dtype": (None, BF16, FP32),
            "interleaved": (False, True),
            "scale_per_head": (False, True),
            "gap": (None, 0, 8),
            "block_size": (16, 32),
            "num_blocks": (4, 5),
            "max_positions": (64, 128),
            "spoil": (
                *_spoils("strided wide longer", "positions", "slot_mapping", "k_cache", "v_cache"),
                *_spoils("strided wide longer missing", "cos", "sin", "q_weight", "k_weight")[1:],
                *_spoils("strided wide longer missing", "k_scale", "v_scale")[1:],
                ("qkv", "strided"),
                ("qkv", "wide"),
            ),
        },
        unseen=(1,),
    ),
    "decode_plan": Launcher(
        attention_decode_plan,
        _plan,
        {"rows": (3, 2), "split_size": (256, 512, 24), "window": (None, 40, 50, 0)},
        unseen=(0, 1),
    ),
    "decode": Launcher(
        attention_decode,
        _decode,
        {**_STEP, "split_size": (256, 512), "planned": (0, 32)},
    ),
    "prefill": Launcher(attention_prefill, _prefill, {**_STEP, "causal": (True, False)}, unseen=(1,)),
}


# --- what is recorded


@dataclass
class Record:
    """The kernels that a GPU would run: of variants that it has met, those of their first launch."""

    keys: dict[Any, str]
    last: str = ""

    def start(self, variant: Variant, target: Target, args: tuple[Any, ...]) -> None:
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        aligned = tuple(tensor.data_ptr() % 16 == 0 for tensor in tensors)
        place = target, variant, aligned
        if place not in self.keys:
            self.keys[place] = specialise(variant.kernel, args, variant.constants, variant.config, target).key
        self.last = self.keys[place]


def _outcome(launcher: Launcher, target: Target, options: dict[str, Any], record: Record) -> str:
    """The key of the kernel, or how the call is refused."""
    with pytest.MonkeyPatch.context() as patch, intercepting(target, lambda launch: None):
        patch.setattr(Variant, "start", lambda self, grid, *args: record.start(self, target, args))
        try:
            launcher.call(**options)
        except KernelError as error:
            return f"refused: {error}"
    return record.last


@cache
def _fresh_outcomes(name: str) -> tuple[str, ...]:
    """Of each of the launcher's calls, as if it were the first in its process."""
    launcher, outcomes = LAUNCHERS[name], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher.module, "_variant", launcher.module._variant.__wrapped__)
        for target, options in launcher.calls():
            outcomes.append(_outcome(launcher, target, options, Record({})))
    return tuple(outcomes)


def _wrong_calls(name: str) -> Iterator[str]:
    """The calls of one process after another that do not have the outcome of a fresh one."""
    launcher, record = LAUNCHERS[name], Record({})
    for (target, options), fresh in zip(launcher.calls(), _fresh_outcomes(name), strict=True):
        found = _outcome(launcher, target, options, record)
        if found != fresh:
            yield f"{target.name} {options}: {found} in place of {fresh}"


def _cached(choose: Callable[..., Variant], dropped: int) -> Callable[..., Variant]:
    """choose, cached by all of its arguments but one."""
    made: dict[tuple[Any, ...], Variant] = {}

    def variant(*facts: Any) -> Variant:
        key = facts[:dropped] + facts[dropped + 1 :]
        if key not in made:
            made[key] = choose(*facts)
        return made[key]

    return variant


def _num_facts(launcher: Launcher) -> int:
    """How many arguments `_variant` is called with."""
    given: list[Any] = []
    find = launcher.module._variant
    target, options = next(launcher.calls())

    def note(*facts: Any) -> Variant:
        given.extend(facts)
        found: Variant = find(*facts)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher.module, "_variant", note)
        _outcome(launcher, target, options, Record({}))
    return len(given)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_variant_is_what_a_fresh_process_would_choose(name: str) -> None:
    find = LAUNCHERS[name].module._variant
    find.cache_clear()
    assert not list(_wrong_calls(name))
    refused = [outcome.startswith("refused") for outcome in _fresh_outcomes(name)]
    made = find.cache_info().currsize
    assert 8 < made < len(refused) - sum(refused), "calls that differ in what varies share a variant"
    assert not list(_wrong_calls(name)), "when all variants are there"
    assert find.cache_info().currsize == made


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_fact_that_is_left_out_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = LAUNCHERS[name]
    find = launcher.module._variant
    _fresh_outcomes(name)  # kept, from before anything is left out
    unnoticed = []
    for index in range(_num_facts(launcher)):
        monkeypatch.setattr(launcher.module, "_variant", _cached(find.__wrapped__, index))
        if next(_wrong_calls(name), None) is None:
            unnoticed.append(index)
    assert tuple(unnoticed) == launcher.unseen


def test_a_bucket_stands_for_every_size_that_has_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    def entries(*buckets: int) -> tuple[tuple[int, KernelConfig], ...]:
        return tuple((bucket, KernelConfig({"BLOCK": bucket})) for bucket in buckets)

    tables = {"sm_90": {"k": {"a": entries(3, 40, 300), "b": entries(16), "c": entries(2, 40, 41)}}}
    monkeypatch.setattr(tuning, "tuned_table", lambda name: tables.get(name, {}))
    target, default = TARGETS["sm_90"], KernelConfig({})
    for key, size in itertools.product("abcd", range(400)):
        bucket = tuned_bucket("k", target, size)
        chosen = [pick_config("k", target, key, n, lambda: default) for n in (size, bucket)]
        assert chosen[0] is chosen[1]
    assert {tuned_bucket("k", target, size) for size in range(400)} == {2, 3, 16, 40, 41, 300}
    assert {tuned_bucket("other", target, size) for size in range(400)} == {0}
    assert {tuned_bucket("k", TARGETS["sm_80"], size) for size in range(400)} == {0}
