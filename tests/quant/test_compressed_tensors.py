"""compressed-tensors' formats, held against the package that writes them; W8A8 against its rounding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from ct_checkpoints import (
    DYNAMIC,
    FP8,
    FP8_DYNAMIC,
    FP8_STATIC,
    MXFP4,
    MXFP8,
    STATIC,
    check_weights,
    compress,
    config,
    group,
    int_args,
)
from quantized_checkpoints import (
    LINEARS,
    TOKENS,
    Quantize,
    Stored,
    check_quantized,
    write_quantized,
)
from tiny_models import load_model, run_model
from tolerances import W8A8_LOGITS


@pytest.mark.parametrize(
    "group",
    [
        group(int_args(4, 64), "pack-quantized"),
        group(int_args(3, 16, symmetric=False), "pack-quantized"),
        group(FP8, "float-quantized", FP8_STATIC),
        MXFP4,
    ],
    ids=lambda g: f"{g['format']}-{g['weights']['num_bits']}",
)
def test_a_checkpoint_is_what_it_stands_for(tmp_path: Path, group: dict[str, Any]) -> None:
    check_quantized(write_quantized(tmp_path, config(group), compress(group), shards=3))


VARIANTS = (
    *(group(int_args(bits, 16, symmetric=bits % 2 == 0), "pack-quantized") for bits in (2, 4, 5, 6, 7, 8)),
    group(int_args(3, -1, symmetric=False), "pack-quantized"),
    group(int_args(5), "pack-quantized"),
    group(int_args(4, None, symmetric=False), "pack-quantized"),
    group(int_args(4, -1), "int-quantized"),
    group(int_args(8, 16, symmetric=False), "naive-quantized"),
    group({**FP8, "strategy": "channel"}, "float-quantized", FP8_DYNAMIC),
    group({**FP8, "group_size": 16}, "naive-quantized"),
    group(
        {**FP8, "strategy": "block", "block_structure": [48, 28]},
        "float-quantized",
        FP8_DYNAMIC,
    ),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_every_variant(tmp_path: Path, dtype: torch.dtype) -> None:
    names = [f"model.layers.{i // 7}.{_owner(leaf)}.{leaf}" for i, leaf in enumerate(LINEARS * 2)]
    groups = dict(zip(names, VARIANTS, strict=True))
    settings = config(
        *(each | {"targets": (name,)} for name, each in groups.items()), format="mixed-precision"
    )
    sizes = {"hidden_size": 48, "intermediate_size": 80}  # 3 bits of 48 end within a word
    written = write_quantized(tmp_path, settings, lambda n, w: compress(groups[n], dtype)(n, w), **sizes)
    check_weights(written)


def _owner(leaf: str) -> str:
    return "self_attn" if leaf in LINEARS[:4] else "mlp"


@pytest.mark.parametrize("group", [MXFP4, MXFP8], ids=["mxfp4", "mxfp8"])
def test_weights_of_powers_of_two(tmp_path: Path, group: dict[str, Any]) -> None:
    check_weights(write_quantized(tmp_path, config(group), compress(group), num_hidden_layers=1))


def with_act_order(quantize: Quantize, size: int, bits: int) -> Quantize:
    """Groups of columns that do not lie side by side, as releases before 0.10 wrote them."""

    def ordered(name: str, weight: torch.Tensor) -> Stored:
        groups = torch.arange(weight.shape[1]) // size
        shuffled = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(len(name)))
        groups = groups[shuffled]
        order = torch.argsort(groups, stable=True)
        stored = quantize(name, weight[:, order])
        back = torch.argsort(order)
        codes = unpack_from_int32(stored.tensors["weight_packed"], bits, weight.shape)[:, back]
        changed = {"weight_packed": pack_to_int32(codes, bits), "weight_g_idx": groups.int()}
        return Stored({**stored.tensors, **changed}, stored.weight[:, back].contiguous())

    return ordered


def test_act_order(tmp_path: Path) -> None:
    scheme = group(int_args(4, 32, symmetric=False), "pack-quantized")
    settings = config(scheme)
    settings["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    check_quantized(write_quantized(tmp_path, settings, with_act_order(compress(scheme), 32, 4)))


@pytest.mark.parametrize(
    ("weights", "inputs"),
    [
        (int_args(8, -1), DYNAMIC),
        (int_args(8), DYNAMIC | {"symmetric": False}),
        (int_args(4, -1), STATIC),
        (int_args(8, -1), STATIC | {"symmetric": False}),
    ],
    ids=["dynamic", "dynamic-zero", "static", "static-zero"],
)
def test_w8a8_logits_are_those_of_fake_quantized_linears(
    tmp_path: Path, weights: dict[str, Any], inputs: dict[str, Any]
) -> None:
    import transformers

    scheme = group(weights, "int-quantized", inputs)
    written = write_quantized(tmp_path, config(scheme), compress(scheme), shards=2)
    if inputs is DYNAMIC:
        check_quantized(written, logits=False)
    check_weights(written)
    actual = run_model(load_model(written.quantized), TOKENS, chunk_size=17)
    model = transformers.AutoModelForCausalLM.from_pretrained(written.plain, dtype=torch.float32)
    args = QuantizationArgs(**inputs)
    for name in written.weights:
        tensors = compress(scheme)(name, written.weights[name]).tensors
        module = model.get_submodule(name)
        module.register_forward_pre_hook(_fake_quantizer(args, tensors))
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0]
        for name in written.weights:
            model.get_submodule(name)._forward_pre_hooks.clear()
        plain = model(torch.tensor([TOKENS])).logits[0]
    errors = (actual - expected).abs().amax(1)
    assert int((errors < W8A8_LOGITS["same codes"]).sum()) >= len(TOKENS) // 4
    assert errors.max() < W8A8_LOGITS["one off"]
    assert (plain - expected).abs().amax(1).min() > 1000 * W8A8_LOGITS["same codes"], "rounding shows"


def _fake_quantizer(args: QuantizationArgs, tensors: Any) -> Callable[..., torch.Tensor]:
    def quantized(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        if args.dynamic:
            scale, zero = compute_dynamic_scales_and_zp(inputs[0], args, module)
        else:
            scale, zero = tensors["input_scale"], tensors.get("input_zero_point")
        return fake_quantize(inputs[0], scale, zero, args)

    return quantized
