"""What warm-up builds is what serving asks for: all of it, and little else."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_scenarios import BATCHES, nothing_computed, open_llm, serve, write_model

from halimede.engine.build import open_model
from halimede.engine.config import EngineConfig
from halimede.engine.executor.settings import resolve_settings
from halimede.engine.warmup import meta_model, specialisations, steps
from halimede.engine.warmup.specialisations import serving_specialisations
from halimede.kernels import tuning
from halimede.kernels.launch import Launch
from halimede.kernels.library import describe
from halimede.kernels.specialise import Specialisation
from halimede.kernels.target import find_target

# Of what is warmed, not used by any scenario.
MOST_UNUSED = 0.25
FEW_BLOCKS = 50  # so few that sequences are preempted
_ByKey = dict[str, Specialisation]


def warmed_for(folder: Path, target: str, **settings: Any) -> _ByKey:
    """By key, what warm-up builds."""
    config = EngineConfig(
        model=str(folder),
        load_format="dummy",
        **{"max_num_seqs": 256, "max_num_batched_tokens": 512, **settings},
    )
    _, model_config = open_model(config)
    on_gpu = resolve_settings(config, model_config, torch.device("meta"))
    found = serving_specialisations(config, model_config, on_gpu, find_target(target))
    return {one.key: one for one in found}


def used_by(folder: Path, target: str, batches: tuple[int, ...] = BATCHES, **settings: Any) -> _ByKey:
    """By key, what the scenarios launch."""
    used: _ByKey = {}
    orders: dict[str, tuple[str, ...]] = {}

    def note(launch: Launch) -> None:
        # Launches are told apart by the values of constants alone, which must have one order.
        assert orders.setdefault(launch.kernel.__name__, tuple(launch.constants)) == tuple(launch.constants)
        one = launch.specialise(find_target(target))
        used.setdefault(one.key, one)

    with nothing_computed(find_target(target), note), open_llm(folder, **settings) as llm:
        serve(llm, batches=batches)
        scheduler = llm._core._scheduler
        assert scheduler.prefix_cache_hits > 0
        assert (scheduler.num_preemptions > 0) == (settings.get("num_gpu_blocks_override") == FEW_BLOCKS)
    return used


def numbers_that_are_specialised(one: Specialisation) -> list[str]:
    """Arguments for whose values Triton would make other code."""
    fixed = {parameter.name for parameter in one.kernel.params if parameter.is_constexpr}
    return [
        name
        for name, kind in one.signature.items()
        if (kind[0] in "iu" and ":" in kind) or (name not in fixed and one.constants.get(name) is not None)
    ]


def with_other_zeros(warmed: _ByKey, used: _ByKey) -> _ByKey:
    """What is used, and what is warmed besides because of zeros alone.

    Whether all zeros of a GPTQ weight are one is seen from its values, which warm-up does not read: it builds
    products for both, of which one model uses the one or the other.
    """

    def all_but_zeros(one: Specialisation) -> tuple[Any, ...]:
        kept = {name: value for name, value in one.constants.items() if name not in ("ZERO", "HAS_ZEROS")}
        return (one.kernel.__name__, *sorted(map(repr, kept.items())), repr(one.options))

    met = {all_but_zeros(one) for one in used.values()}
    return used | {key: one for key, one in warmed.items() if all_but_zeros(one) in met}


def check(warmed: _ByKey, used: _ByKey, name: str) -> None:
    missing = [describe(one) for key, one in used.items() if key not in warmed]
    assert not missing
    assert not [describe(one) for one in warmed.values() if numbers_that_are_specialised(one)]
    unused = [describe(one) for key, one in warmed.items() if key not in used]
    share = len(unused) / len(warmed)
    print(f"{name}: {len(warmed)} kernels warmed, {len(unused)} ({share:.0%}) in no scenario")
    assert share <= MOST_UNUSED, unused


def test_every_batch_size(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama")
    check(warmed_for(folder, "sm_90"), used_by(folder, "sm_90"), "llama sm_90")


@pytest.mark.parametrize(
    ("model", "target", "settings"),
    [
        ("llama", "sm_90", {"dtype": "float16", "kv_cache_dtype": "fp8", "block_size": 64}),
        ("llama", "gfx1100", {"num_gpu_blocks_override": FEW_BLOCKS}),
        ("qwen3", "sm_80", {"dtype": "float32"}),
        ("mistral", "sm_120", {"kv_cache_dtype": "int8", "max_model_len": 512}),
        ("gemma3", "sm_100", {"enable_chunked_prefill": False, "max_num_batched_tokens": 1024}),
    ],
)
def test_every_model_and_type(model: str, target: str, settings: dict[str, Any], tmp_path: Path) -> None:
    folder = write_model(tmp_path, model)
    warmed = warmed_for(folder, target, **settings)
    used = used_by(folder, target, (1, 17), **settings)
    check(warmed, used, f"{model} {target} {settings}")


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
_W8A8 = {
    "weights": {"num_bits": 8, "strategy": "channel"},
    "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True},
}
_INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {"all": {"targets": ["Linear"], **_W8A8}},
    "ignore": ["lm_head"],
}
_FP8 = {"quant_method": "fp8"}
QUANTIZED: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 64},
    "awq with lm_head": {"quant_method": "awq", "bits": 4, "group_size": 128, "lm_head": True},
    "gptq": _GPTQ,
    "gptq but for a layer": {**_GPTQ, "dynamic": {r"-:.*layers\.0\.": {}}},
    "gptq with a layer of its own": {**_GPTQ, "dynamic": {r".*layers\.1\.": {"bits": 8}}},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": _INT8,
    "fp8": {**_FP8, "activation_scheme": "static"},
    "fp8 in blocks": {**_FP8, "weight_block_size": [64, 64], "modules_to_not_convert": ["down_proj"]},
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_layers(name: str, tmp_path: Path) -> None:
    """Products of every size of step; what is rounded by whom; gates that are plain beside quantized ones."""
    folder = write_model(tmp_path, "llama", quantization_config=QUANTIZED[name])
    warmed = warmed_for(folder, "sm_90")
    used = used_by(folder, "sm_90", (1, 17, 200))
    check(warmed, with_other_zeros(warmed, used) if name.startswith("gptq") else used, name)
    names = {one.kernel.__name__ for one in warmed.values()}
    assert ("_gated_matmul_kernel" in names) == (name == "gptq but for a layer")


@pytest.mark.parametrize(("target", "dtype"), [("gfx942", "bfloat16"), ("sm_80", "float16")])
@pytest.mark.parametrize("name", ["awq", "int8", "fp8 in blocks"])
def test_quantized_layers_elsewhere(name: str, target: str, dtype: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, "qwen3", quantization_config=QUANTIZED[name])
    warmed = warmed_for(folder, target, dtype=dtype)
    check(warmed, used_by(folder, target, (1, 17), dtype=dtype), f"{name} {target}")


def test_a_quantized_layer_that_is_forgotten_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path, "llama", quantization_config=QUANTIZED["gptq with a layer of its own"])
    monkeypatch.setattr(meta_model, "_few_layers", lambda config, modules: (config, [0, 0, 2]))
    with pytest.raises(AssertionError, match="BITS=8"):
        check(warmed_for(folder, "sm_90"), used_by(folder, "sm_90", (1,)), "without the layer")


def test_a_size_of_step_that_is_forgotten_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path, "llama", quantization_config=QUANTIZED["awq"])
    monkeypatch.setattr(specialisations, "_sizes", lambda model, target: [])
    with pytest.raises(AssertionError, match="wna16_matmul"):
        check(warmed_for(folder, "sm_90"), used_by(folder, "sm_90", (1, 17)), "only the smallest and largest")


def test_caches_that_are_longer_than_32_bits_reach_have_kernels_of_their_own(tmp_path: Path) -> None:
    """On AMD GPUs; which it will be hangs on the memory of the GPU."""
    folder = write_model(tmp_path, "gemma3")
    settings = {"kv_cache_dtype": "int8", "block_size": 128}
    long = (1 << 31) // (2 * 128 * 32)  # blocks of 2 heads of 32 bytes
    short_used = used_by(folder, "gfx942", (1, 2), **settings)
    long_used = used_by(folder, "gfx942", (1, 2), num_gpu_blocks_override=long, **settings)
    assert long_used.keys() - short_used.keys()
    check(warmed_for(folder, "gfx942", **settings), short_used | long_used, "gemma3 gfx942")


def test_every_bucket_of_a_tuned_table_is_warmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices that hang on the number of tokens or rows come from tables only."""

    def entries(**blocks: list[int]) -> Mapping[str, Any]:
        (name, sizes), *others = blocks.items()
        return {
            str(bucket): {
                "blocks": {name: size, **{other: values[0] for other, values in others}},
                "num_warps": 4,
                "num_stages": 1,
            }
            for bucket, size in zip((3, 40, 300), sizes, strict=True)
        }

    key = "torch.bfloat16,torch.bfloat16,32,16,plain"
    table = tmp_path / "sm_90.json"
    prefill = entries(BLOCK_M=[16, 32, 64], BLOCK_N=[32], V_PARTS=[1], PIECE=[0])
    plan = entries(BLOCK=[64, 128, 256])
    table.write_text(json.dumps({"attention_prefill": {key: prefill}, "attention_decode_plan": {"": plan}}))
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    tuning.tuned_table.cache_clear()
    try:
        folder = write_model(tmp_path, "llama")
        warmed, used = warmed_for(folder, "sm_90"), used_by(folder, "sm_90")
    finally:
        tuning.tuned_table.cache_clear()
    assert len([one for one in warmed.values() if "prefill" in one.name]) == 3
    assert len([one for one in warmed.values() if "decode_plan" in one.name]) == 3
    check(warmed, used, "tuned")


def test_a_setting_that_changes_kernels_changes_what_is_warmed(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama")
    plain = warmed_for(folder, "sm_90")
    for settings in (
        {"dtype": "float16"},
        {"kv_cache_dtype": "int8"},
        {"block_size": 64},
        {"max_logprobs": 100},
        {"attention_backend": "torch"},
    ):
        assert warmed_for(folder, "sm_90", **settings).keys() != plain.keys(), settings
    assert warmed_for(folder, "sm_90", max_num_seqs=7, seed=3).keys() == plain.keys()


def test_a_kind_of_step_that_is_forgotten_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decoding(*arguments: Any) -> list[Any]:
        return [step for step in steps.model_steps(*arguments) if step.attn.max_query_len == 1]

    folder = write_model(tmp_path, "llama")
    monkeypatch.setattr(specialisations, "model_steps", decoding)
    with pytest.raises(AssertionError, match="prefill for sm_90"):
        check(warmed_for(folder, "sm_90"), used_by(folder, "sm_90", (1, 2)), "decoding only")


def test_layers_that_are_alike_are_looked_at_once(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama")
    plain = warmed_for(folder, "sm_90")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 200}))
    assert warmed_for(folder, "sm_90").keys() == plain.keys()


def test_finding_them_does_not_import_sympy(tmp_path: Path) -> None:
    """Some of torch's operations on the meta device do, which takes longer than all the rest."""
    folder = write_model(tmp_path, "llama")
    code = f"""
import sys
from pathlib import Path
from test_specialisations import warmed_for
assert warmed_for(Path({str(folder)!r}), "sm_90")
print("sympy" in sys.modules)
"""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"
