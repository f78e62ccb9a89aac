"""AWQ checkpoints, packed here as AutoAWQ does (awq/utils/packing_utils.py, awq/modules/linear/gemm.py)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_checkpoints import Quantize, Stored, check_quantized, write_quantized
from tiny_models import read_config

from halimede import LLM, ModelLoadError, UnsupportedQuantizationError

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """[R, N] below 16 to int32 [R, N / 8]: of eight columns, ORDER[i] goes to bits 4 i."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for place, column in enumerate(ORDER):
        words |= codes[:, column::8].long() << (4 * place)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def awq(group_size: int, seed: int = 0) -> Quantize:
    generator = torch.Generator().manual_seed(seed)

    def quantize(name: str, weight: torch.Tensor) -> Stored:
        rows, columns = weight.shape
        size = columns if group_size == -1 else group_size
        scales = (0.02 + 0.05 * torch.rand(columns // size, rows, generator=generator)).half()
        zeros = torch.randint(16, (columns // size, rows), generator=generator)
        wide = scales.float().repeat_interleave(size, 0)
        wide_zeros = zeros.repeat_interleave(size, 0)
        codes = (weight.t() / wide + wide_zeros).round().clamp(0, 15).to(torch.uint8)
        dequantized = (codes.float() - wide_zeros.float()) * wide
        return Stored({"qweight": pack(codes), "qzeros": pack(zeros), "scales": scales}, dequantized.t())

    return quantize


def config(group_size: int, **more: Any) -> dict[str, Any]:
    settings = {"bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    return {"quant_method": "awq", **settings, **more}


@pytest.mark.parametrize("group_size", [16, 32, 64, -1])
def test_an_awq_checkpoint_is_what_it_stands_for(tmp_path: Path, group_size: int) -> None:
    check_quantized(write_quantized(tmp_path, config(group_size), awq(group_size), shards=3))


def test_modules_to_not_convert_are_plain(tmp_path: Path) -> None:
    quantize = awq(32)
    excluded = ["self_attn.v_proj", "model.layers.1.mlp"]
    written = write_quantized(
        tmp_path,
        config(32, modules_to_not_convert=excluded),
        lambda name, w: None if "v_proj" in name or "layers.1.mlp" in name else quantize(name, w),
    )
    check_quantized(written)


def test_a_quantized_lm_head(tmp_path: Path) -> None:
    modules = ("q_proj", "lm_head", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    check_quantized(write_quantized(tmp_path, config(32, lm_head=True), awq(32), modules=modules))


def _without(suffix: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(suffix)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("qzeros"), r"lacks: model.layers.0.mlp.down_proj.qzeros"),
        (lambda t: t["scales"].fill_(float("nan")), r"down_proj.scales has 256 scales that are NaN"),
        (lambda t: t.update(qweight=t["qweight"][:-1]), r"down_proj.qweight has the shape \(127, 8\)"),
        (lambda t: t.update(scales=t["scales"].int()), r"down_proj.scales is of type int32"),
    ],
)
def test_damage_names_tensor_and_file(
    tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    quantize = awq(32)

    def damaged(name: str, weight: torch.Tensor) -> Stored:
        stored = quantize(name, weight)
        tensors = dict(stored.tensors)
        if name == "model.layers.0.mlp.down_proj":
            damage(tensors)
        return Stored(tensors, stored.weight)

    written = write_quantized(tmp_path, config(32), damaged)
    with pytest.raises(ModelLoadError, match=message) as caught:
        LLM(str(written.quantized), device="cpu", skip_tokenizer_init=True)
    assert "model.safetensors" in str(caught.value)


def test_groups_that_do_not_divide_the_columns(tmp_path: Path) -> None:
    written = write_quantized(tmp_path, config(48), awq(32))
    with pytest.raises(ModelLoadError, match=r"the 64 columns of \S+ are not a multiple of group_size=48"):
        LLM(str(written.quantized), device="cpu", skip_tokenizer_init=True)


@pytest.mark.parametrize(("change", "message"), [({"bits": 3}, "3 bits"), ({"version": "gemv"}, "'gemv'")])
def test_other_variants_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    written = write_quantized(tmp_path, config(32) | change, lambda name, w: None)
    with pytest.raises(UnsupportedQuantizationError, match=message):
        read_config(written.quantized)
