"""Which format compressed-tensors gives each module, by the package itself, and what is refused."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from ct_checkpoints import (
    DYNAMIC,
    FP8,
    FP8_DYNAMIC,
    FP8_STATIC,
    MXFP4,
    STATIC,
    check_weights,
    compress,
    config,
    group,
    int_args,
)
from quantized_checkpoints import (
    LINEARS,
    Stored,
    check_quantized,
    write_quantized,
)
from tiny_models import load_model, read_config

from halimede import ModelLoadError, UnsupportedQuantizationError

DOWN = "model.layers.0.mlp.down_proj"


MIXED = (
    group(int_args(4, 32), "pack-quantized", None, "re:.*q_proj$"),
    group(FP8, "float-quantized", FP8_DYNAMIC, "model.layers.0.self_attn.k_proj"),
    group(int_args(5, -1), "int-quantized", None, "re:.*mlp", "re:.*up_proj", "no.such.module", "Conv2d"),
    group(int_args(8, 16, symmetric=False), "pack-quantized", None, "Linear", "model.layers.1.mlp.up_proj"),
)
IGNORED = ["lm_head", "re:.*1.self_attn.v_proj", "model.layers.0.mlp.gate_proj"]


def _packages_choice(folder: Path, settings: dict[str, Any]) -> dict[str, QuantizationScheme]:
    """The scheme that the package gives each module."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    apply_quantization_config(model, QuantizationConfig.model_validate(settings), show_progress=False)
    return {
        name: module.quantization_scheme
        for name, module in model.named_modules()
        if hasattr(module, "quantization_scheme")
    }


@pytest.mark.parametrize("own_formats", [True, False])
def test_groups_of_different_formats(tmp_path: Path, own_formats: bool) -> None:
    groups = copy.deepcopy(MIXED)
    if not own_formats:  # as before groups had them: what their arguments say is all there is
        groups[2]["format"] = "pack-quantized"
    settings = config(*groups, format="mixed-precision", ignore=IGNORED)
    for each in settings["config_groups"].values():
        each["format"] = each["format"] if own_formats else None
    chosen = _packages_choice(
        write_quantized(tmp_path / "empty", settings, lambda *_: None).plain, copy.deepcopy(settings)
    )
    by_args = {json.dumps(QuantizationArgs(**each["weights"]).model_dump_json()): each for each in groups}

    def quantize(name: str, weight: torch.Tensor) -> Stored | None:
        if name not in chosen:
            return None
        weights = chosen[name].weights
        assert weights is not None
        return compress(by_args[json.dumps(weights.model_dump_json())])(name, weight)

    written = write_quantized(tmp_path, settings, quantize, shards=2)
    assert set(written.weights) == set(chosen)
    assert len(chosen) == 2 * len(LINEARS) - 2
    (check_quantized if own_formats else check_weights)(written)


def test_the_old_section_and_outputs_and_scales_of_the_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scheme = group(int_args(4, 32), "pack-quantized")
    settings = config(scheme, kv_cache_scheme=FP8_STATIC)
    settings["config_groups"]["group_0"]["output_activations"] = STATIC
    settings |= {"sparsity_config": {"format": "dense"}, "global_compression_ratio": 1.5}

    def quantize(name: str, weight: torch.Tensor) -> Stored:
        stored = compress(scheme)(name, weight)
        return Stored({**stored.tensors, "output_scale": torch.ones(1)}, stored.weight)

    written = write_quantized(tmp_path, settings, quantize)
    path = written.quantized / "config.json"
    whole = json.loads(path.read_text())
    del whole["quantization_config"]["quant_method"]
    whole["compression_config"] = {"quantization_config": whole.pop("quantization_config")}
    path.write_text(json.dumps(whole))
    with caplog.at_level(logging.WARNING):
        check_weights(written)
        load_model(written.quantized)
    assert "(output_activations) is ignored" in caplog.text
    scheme_read = read_config(written.quantized).quantization
    assert scheme_read is not None
    assert scheme_read.kv_cache_scales


def test_an_embedding_and_a_head(tmp_path: Path) -> None:
    scheme = group(int_args(8, 16), "pack-quantized", None, "Linear", "Embedding")
    modules = ("lm_head", "embed_tokens")
    settings = config(scheme, ignore=["re:.*proj"])
    check_quantized(write_quantized(tmp_path, settings, compress(scheme), modules=modules))


Damage = Callable[[dict[str, torch.Tensor]], object]
PACKED = group(int_args(4, 32, symmetric=False), "pack-quantized")
INTEGERS = group(int_args(4, -1), "int-quantized")
FLOATS = group(FP8, "float-quantized", FP8_STATIC)
W8A8 = group(int_args(8, -1), "int-quantized", STATIC | {"symmetric": False})


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["weight"].view(torch.uint8)[3, 5] = 0xFF


@pytest.mark.parametrize(
    ("group", "damage", "message"),
    [
        (PACKED, lambda t: t.pop("weight_zero_point"), f"lacks: {DOWN}.weight_zero_point"),
        (
            PACKED,
            lambda t: t.update(weight_packed=t["weight_packed"][:, :-1]),
            r"packed has the shape \(64, 15\)",
        ),
        (PACKED, lambda t: t["weight_scale"].fill_(torch.inf), "weight_scale has 256 scales that are NaN"),
        (PACKED, lambda t: t["weight_shape"].fill_(64), r"weight_shape says \[64, 64\]"),
        (PACKED, lambda t: t.update(weight_g_idx=torch.zeros(128).int()), "weight_g_idx does not give each"),
        (INTEGERS, lambda t: t["weight"].fill_(8), "weight has 8192 codes outside -8..7"),
        (FLOATS, _nan, "weight has 1 codes that are NaN"),
        (FLOATS, lambda t: t["weight_scale"].fill_(torch.nan), "weight_scale has 1 scales that are NaN"),
        (FLOATS, lambda t: t.update(weight_scale=torch.ones(2)), r"weight_scale has the shape \(2,\)"),
        (W8A8, lambda t: t["input_scale"].zero_(), "input_scale is 0"),
        (W8A8, lambda t: t.update(input_zero_point=torch.tensor([200])), "input_zero_point is 200"),
        (MXFP4, lambda t: t["weight_scale"].fill_(255), "weight_scale has 256 scales that are NaN"),
    ],
)
def test_damage_names_tensor_and_file(
    tmp_path: Path, group: dict[str, Any], damage: Damage, message: str
) -> None:
    def damaged(name: str, weight: torch.Tensor) -> Stored:
        stored = compress(group)(name, weight)
        tensors = {suffix: tensor.clone() for suffix, tensor in stored.tensors.items()}
        if name == DOWN:
            damage(tensors)
        return Stored(tensors, stored.weight)

    settings = config(group | {"targets": (DOWN,)})
    written = write_quantized(tmp_path, settings, damaged, modules=("layers.0.mlp.down_proj",))
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_model(written.quantized)
    assert DOWN in str(caught.value)
    assert "model.safetensors" in str(caught.value)


def test_groups_that_do_not_divide_the_columns(tmp_path: Path) -> None:
    settings = config(group(int_args(4, 48), "pack-quantized"))
    written = write_quantized(tmp_path, settings, compress(group(int_args(4, 32), "pack-quantized")))
    with pytest.raises(ModelLoadError, match=r"the 64 columns of \S+ are not a multiple of group_size=48"):
        load_model(written.quantized)


NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (group(NVFP4, "nvfp4-pack-quantized"), r"float4 \(tensor_group of 16\) weights .* 'nvfp4-pack"),
        (group(int_args(4, 32), "marlin-24"), "as 'marlin-24' are not supported"),
        (group(int_args(9, 32), "pack-quantized"), r"int9 \(group of 32\)"),
        (group(int_args(4, 32), "int-quantized", FP8_DYNAMIC), r"int4 .* with float8 \(token, dynamic\)"),
        (group(int_args(8, -1), "int-quantized", STATIC | {"dynamic": True}), r"int8 \(tensor, dynamic\)"),
        (group(int_args(8, -1, symmetric=False), "int-quantized", DYNAMIC), r"int8 \(channel, asymmetric\)"),
        (group(FP8, "float-quantized", DYNAMIC), r"float8 .* with int8 \(token"),
    ],
)
def test_other_variants_are_refused(tmp_path: Path, group: dict[str, Any], message: str) -> None:
    written = write_quantized(tmp_path, config(group), lambda *_: None)
    with pytest.raises(UnsupportedQuantizationError, match=f"group_0.*{message}.*supported: pack-quantized"):
        read_config(written.quantized)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "'sparse-24-bitmask' are not supported"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "transform_config, which rotates"),
        ({"ignore": ["re:*"]}, r"'re:\*' is not a regular expression"),
        ({"config_groups": {"g": {"weights": {"strategy": "heap"}}}}, "strategy='heap' must be one of"),
        ({"config_groups": {"g": {"weights": {"type": "bool"}}}}, "type='bool' must be"),
        ({"config_groups": {"g": {"weights": {"actorder": 3}}}}, "actorder=3 must be"),
        ({"config_groups": {"g": {"weights": {"strategy": "block"}}}}, "block_structure"),
    ],
)
def test_wrong_settings(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    written = write_quantized(tmp_path, config(PACKED) | change, lambda *_: None)
    with pytest.raises(ModelLoadError, match=message):
        read_config(written.quantized)
