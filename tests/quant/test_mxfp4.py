"""MXFP4 checkpoints, named as transformers names gpt-oss's; the oracles are gguf and compressed-tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from quantized_checkpoints import LINEARS, Stored, check_quantized, write_quantized
from tiny_models import read_config

from halimede import LLM, ModelLoadError
from halimede.engine.quant.mxfp4 import mxfp4_weight

GROUP = 32
MXFP4 = gguf.GGMLQuantizationType.MXFP4


def quantize(name: str, weight: torch.Tensor) -> Stored:
    """By gguf, whose blocks are a scale byte and 16 bytes with the first 16 codes in the low bits."""
    rows, columns = weight.shape
    data = gguf.quants.quantize(weight.numpy(), MXFP4)
    dequantized = torch.from_numpy(gguf.quants.dequantize(data, MXFP4).copy())
    blocks = torch.from_numpy(data.reshape(rows, columns // GROUP, 17).copy())
    codes = torch.cat((blocks[..., 1:] & 15, blocks[..., 1:] >> 4), -1)
    packed = codes[..., ::2] | codes[..., 1::2] << 4
    return Stored({"weight_blocks": packed, "weight_scales": blocks[..., 0].clone()}, dequantized)


def config(**more: Any) -> dict[str, Any]:
    return {"quant_method": "mxfp4", **more}


def test_an_mxfp4_checkpoint_is_what_it_stands_for(tmp_path: Path) -> None:
    check_quantized(write_quantized(tmp_path, config(), quantize, shards=3))


def test_a_list_says_what_is_plain(tmp_path: Path) -> None:
    """And lm_head is not, where the list leaves it out: v has another kind of weight than q and k."""
    written = write_quantized(
        tmp_path,
        config(modules_to_not_convert=["model.layers.*.self_attn.v_proj"]),
        lambda name, w: None if name.endswith("v_proj") else quantize(name, w),
        modules=(*LINEARS, "lm_head"),
    )
    check_quantized(written)


def test_every_code_and_scale_is_what_compressed_tensors_reads() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    packed = torch.arange(256, dtype=torch.uint8).repeat(255, 1)
    exponents = torch.arange(255, dtype=torch.uint8)[:, None].repeat(1, 16)
    values = helpers.unpack_fp4_from_uint8(packed, 255, 512, dtype=torch.float32)
    scales = torch.ldexp(torch.ones(255, 1, dtype=torch.float64), exponents[:, :1].int() - 127)
    assert torch.equal(mxfp4_weight(packed, exponents).dequantize(), (values.double() * scales).float())


def test_every_code_and_scale_is_what_gguf_reads() -> None:
    codes = np.tile(np.arange(16, dtype=np.uint8) * 17, (255, 1))  # the same code in both halves of a byte
    data = np.concatenate((np.arange(255, dtype=np.uint8)[:, None], codes), 1)
    with np.errstate(over="ignore"):
        expected = torch.from_numpy(gguf.quants.dequantize(data, MXFP4).copy())
    packed = torch.arange(16, dtype=torch.uint8)
    packed = torch.cat((packed[::2] | packed[1::2] << 4,) * 2).repeat(255, 1)
    exponents = torch.arange(255, dtype=torch.uint8)[:, None]
    assert torch.equal(mxfp4_weight(packed, exponents).dequantize(), expected)


def _without(suffix: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(suffix)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("weight_scales"), r"lacks: model.layers.0.mlp.down_proj.weight_scales"),
        (lambda t: t["weight_scales"][3].fill_(255), r"down_proj.weight_scales has 4 scales that are NaN"),
        (
            lambda t: t.update(weight_blocks=t["weight_blocks"][..., :-1]),
            r"down_proj.weight_blocks has the shape \(64, 4, 15\), not \(64, 4, 16\)",
        ),
        (lambda t: t.update(weight_scales=t["weight_scales"].float()), r"down_proj.weight_scales is of type"),
    ],
)
def test_damage_names_tensor_and_file(
    tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    def damaged(name: str, weight: torch.Tensor) -> Stored:
        stored = quantize(name, weight)
        tensors = dict(stored.tensors)
        if name == "model.layers.0.mlp.down_proj":
            damage(tensors)
        return Stored(tensors, stored.weight)

    written = write_quantized(tmp_path, config(), damaged)
    with pytest.raises(ModelLoadError, match=message) as caught:
        LLM(str(written.quantized), device="cpu", skip_tokenizer_init=True)
    assert "model.safetensors" in str(caught.value)


def test_columns_that_are_not_whole_groups(tmp_path: Path) -> None:
    excluded = ["gate_proj", "up_proj", "lm_head", "self_attn"]
    written = write_quantized(
        tmp_path,
        config(modules_to_not_convert=excluded),
        lambda name, w: Stored({"weight_blocks": torch.zeros(1), "weight_scales": torch.zeros(1)}, w),
        modules=("down_proj",),
        intermediate_size=112,
    )
    with pytest.raises(ModelLoadError, match=r"the 112 columns of \S+down_proj are not a multiple"):
        LLM(str(written.quantized), device="cpu", skip_tokenizer_init=True)


def test_the_list_must_be_one(tmp_path: Path) -> None:
    written = write_quantized(tmp_path, config(modules_to_not_convert="lm_head"), lambda name, w: None)
    with pytest.raises(ModelLoadError, match="must be a list of strings"):
        read_config(written.quantized)
