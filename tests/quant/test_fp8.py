"""FP8 checkpoints, quantized as transformers and FBGEMM do, held against transformers' own dequantization."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_checkpoints import Quantize, Stored, check_quantized, read_weights, write_quantized
from tiny_models import load_model, read_config

from halimede import ModelLoadError, UnsupportedQuantizationError

DOWN = "model.layers.0.mlp.down_proj"
LARGEST = 448.0


def fp8(
    block: tuple[int, int] | None = None,
    scale: str = "weight_scale",
    shape: tuple[int, ...] = (),
    **more: Any,
) -> Quantize:
    """block: None for one scale, of this shape. more: further tensors of each module."""

    def quantize(name: str, weight: torch.Tensor) -> Stored:
        rows, columns = block or weight.shape
        spare = (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows)
        padded = torch.nn.functional.pad(weight, spare)
        blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        scales = blocks.abs().amax((1, 3)) / LARGEST
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        wide = (codes.float() * scales[:, None, :, None]).flatten(2).flatten(0, 1)
        codes = codes.view(torch.uint8).flatten(2).flatten(0, 1).view(torch.float8_e4m3fn)
        kept = slice(weight.shape[0]), slice(weight.shape[1])
        scales = scales if block else scales.reshape(shape)
        return Stored({"weight": codes[kept], scale: scales, **more}, wide[kept].contiguous())

    return quantize


def rows(name: str, weight: torch.Tensor) -> Stored:
    """As FBGEMM: a scale for each row."""
    return fp8((1, weight.shape[1]), input_scale_ub=torch.tensor(1200.0))(name, weight)


def with_powers_of_two(dtype: torch.dtype) -> Quantize:
    """Scales that are powers of two, by transformers' Fp8Dequantize; its blocks are whole."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    def quantize(name: str, weight: torch.Tensor) -> Stored:
        stored = fp8((32, 32), "weight_scale_inv")(name, weight)
        scales = stored.tensors["weight_scale_inv"]
        scales = torch.exp2(torch.log2(scales).ceil()).to(torch.float8_e8m0fnu)
        reference = Fp8Dequantize(None)._dequantize_one(stored.tensors["weight"], scales, torch.float32)
        kept = scales.view(torch.uint8) if dtype == torch.uint8 else scales.to(dtype)
        return Stored({**stored.tensors, "weight_scale_inv": kept}, reference)

    return quantize


def config(**settings: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", **settings}


STATIC = {"input_scale": torch.tensor(0.03)}
VARIANTS: dict[str, tuple[dict[str, Any], Quantize]] = {
    "block": (config(weight_block_size=[32, 32]), fp8((32, 32), "weight_scale_inv")),
    "tensor": (config(activation_scheme="static"), fp8(**STATIC)),
    "rows": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, rows),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_fp8_checkpoint_is_what_it_stands_for(tmp_path: Path, variant: str) -> None:
    settings, quantize = VARIANTS[variant]
    check_quantized(write_quantized(tmp_path, settings, quantize, shards=3))


@pytest.mark.parametrize(
    ("settings", "quantize"),
    [
        (config(weight_block_size=[48, 40]), fp8((48, 40), "weight_scale_inv")),
        (config(fmt="float8_e4m3fn"), fp8(scale="weight_scale_inv", shape=(1,))),
        (config(activation_scheme="static"), fp8(activation_scale=torch.tensor([0.1]))),
    ],
    ids=["ragged blocks", "transformers' names", "transformers' names, static"],
)
def test_weights_of_other_variants(tmp_path: Path, settings: dict[str, Any], quantize: Quantize) -> None:
    written = write_quantized(tmp_path, settings, quantize)
    weights = read_weights(written.quantized)
    assert weights.keys() == written.weights.keys()
    for name, expected in written.weights.items():
        assert torch.equal(weights[name], expected), name
    load_model(written.quantized)


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.uint8, torch.float32])
def test_scales_that_are_powers_of_two(tmp_path: Path, dtype: torch.dtype) -> None:
    settings = config(weight_block_size=[32, 32], scale_fmt="ue8m0")
    written = write_quantized(tmp_path, settings, with_powers_of_two(dtype), num_hidden_layers=1)
    weights = read_weights(written.quantized)
    for name, expected in written.weights.items():
        assert torch.equal(weights[name], expected), name


def test_blocks_that_parts_of_a_fused_module_cut(tmp_path: Path) -> None:
    # k_proj and v_proj have 32 rows, which end within a block of 48; some modules are plain.
    settings = config(weight_block_size=[48, 64], modules_to_not_convert=["1.self_attn.k_proj", "0.mlp"])
    quantize = fp8((48, 64), "weight_scale_inv")
    check_quantized(
        write_quantized(
            tmp_path,
            settings,
            lambda name, w: None if "1.self_attn.k_proj" in name or "0.mlp" in name else quantize(name, w),
        )
    )


Damage = Callable[[dict[str, torch.Tensor]], object]


@pytest.mark.parametrize(
    ("variant", "damage", "message"),
    [
        ("block", lambda t: t.pop("weight_scale_inv"), f"lacks: {DOWN}.weight_scale_inv"),
        (
            "tensor",
            lambda t: t.pop("weight_scale"),
            "has neither of weight_scale and weight_scale_inv",
        ),
        ("tensor", lambda t: t.update(weight_scale_inv=t["weight_scale"]), "weight has both of weight_scale"),
        ("tensor", lambda t: t.pop("input_scale"), "weight has neither of input_scale and activation_scale"),
        ("block", lambda t: t.update(weight_scale_inv=torch.ones(2, 3)), r"shape \(2, 3\), not \(2, 4\)"),
        ("rows", lambda t: t.update(weight=t["weight"].float()), "weight is of type float32, not float8"),
        ("rows", lambda t: t["weight_scale"].fill_(torch.inf), "weight_scale has 64 scales that are NaN"),
        ("rows", lambda t: t["weight"].view(torch.uint8)[0].fill_(127), "weight has 128 codes that are NaN"),
        (
            "block",
            lambda t: t.update(weight_scale_inv=torch.full((2, 4), 255, dtype=torch.uint8)),
            "weight_scale_inv has 8 scales that are NaN",
        ),
    ],
)
def test_damage_names_tensor_and_file(tmp_path: Path, variant: str, damage: Damage, message: str) -> None:
    settings, quantize = VARIANTS[variant]

    def damaged(name: str, weight: torch.Tensor) -> Stored:
        stored = quantize(name, weight)
        tensors = {suffix: tensor.clone() for suffix, tensor in stored.tensors.items()}
        if name == DOWN:
            damage(tensors)
        return Stored(tensors, stored.weight)

    written = write_quantized(tmp_path, settings, damaged, num_hidden_layers=1)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_model(written.quantized)
    assert DOWN in str(caught.value)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (config(fmt="e5m2"), UnsupportedQuantizationError, "fmt='e5m2' is not supported"),
        (config(activation_scheme="none"), UnsupportedQuantizationError, "activation_scheme='none'"),
        (config(weight_block_size=[128]), ModelLoadError, "weight_block_size"),
        (config(weight_block_size=[128, 0.5]), ModelLoadError, "weight_block_size"),
    ],
)
def test_other_variants_are_refused(
    tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    written = write_quantized(tmp_path, settings, lambda *_: None)
    with pytest.raises(error, match=message):
        read_config(written.quantized)
