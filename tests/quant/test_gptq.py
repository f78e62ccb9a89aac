"""GPTQ checkpoints, packed here as AutoGPTQ does (nn_modules/qlinear/qlinear_cuda.py)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_checkpoints import (
    LINEARS,
    Checkpoints,
    Quantize,
    Stored,
    check_quantized,
    read_weights,
    write_quantized,
)
from tiny_models import read_config

from halimede import LLM, ModelLoadError, UnsupportedQuantizationError
from halimede.engine.quant.gptq import GptqFormat
from halimede.engine.quant.stored import StoredModule

DOWN = "model.layers.0.mlp.down_proj"


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[R, C] below 2^bits to int32 [R * bits / 32, C]: of 3 bits the 11th and 22nd of 32 lie in two words."""
    codes = codes.long()
    if bits != 3:
        parts = codes.view(-1, 32 // bits, codes.shape[1])
        words = sum(parts[:, i] << bits * i for i in range(32 // bits))
    else:
        c = codes.view(-1, 32, codes.shape[1]).unbind(1)
        first = sum(c[i] << 3 * i for i in range(10)) | (c[10] & 3) << 30
        second = c[10] >> 2 | sum(c[11 + i] << 3 * i + 1 for i in range(10)) | (c[21] & 1) << 31
        third = c[21] >> 1 | sum(c[22 + i] << 3 * i + 2 for i in range(10))
        words = torch.stack((first, second, third), 1).view(-1, codes.shape[1])
    return as_int32(words)


def as_int32(words: torch.Tensor) -> torch.Tensor:
    words = words & 0xFFFFFFFF
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def pack_zeros(zeros: torch.Tensor, bits: int, version: str) -> torch.Tensor:
    """[G, N] to int32 [G, N * bits / 32]; version 1 as GPTQModel's convert_gptq_v2_to_v1_format_module."""
    if version == "gptq_v2":
        return pack(zeros.t(), bits).t()
    if bits == 3:
        return pack((zeros.t() - 1) & 7, bits).t()
    ones = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]
    return as_int32(pack(zeros.t(), bits).t().long() - ones)


def gptq(
    group_size: int, bits: int = 4, version: str = "gptq", sym: bool = True, act_order: bool = False
) -> Quantize:
    generator = torch.Generator().manual_seed(bits)

    def quantize(name: str, weight: torch.Tensor) -> Stored:
        rows, columns = weight.shape
        size = columns if group_size == -1 else group_size
        group_of = torch.arange(columns) // size
        if act_order:
            group_of = group_of[torch.randperm(columns, generator=generator)]
        groups = columns // size
        largest = 2**bits - 1
        scales = ((0.3 + 0.3 * torch.rand(groups, rows, generator=generator)) / largest).half()
        zeros = torch.full((groups, rows), 2 ** (bits - 1))
        if not sym:
            zeros += torch.randint(-1, 2, (groups, rows), generator=generator)
            zeros[:, ::5] = 0  # which borrows from a neighbour in version 1
        wide, wide_zeros = scales.float()[group_of], zeros[group_of]
        codes = (weight.t() / wide + wide_zeros).round().clamp(0, largest)
        tensors = {
            "qweight": pack(codes, bits),
            "qzeros": pack_zeros(zeros, bits, version),
            "scales": scales,
            "g_idx": group_of.int(),
        }
        return Stored(tensors, ((codes - wide_zeros) * wide).t())

    return quantize


def config(group_size: int, bits: int = 4, version: str = "gptq", **more: Any) -> dict[str, Any]:
    settings = {"bits": bits, "group_size": group_size, "checkpoint_format": version, "desc_act": False}
    return {"quant_method": "gptq", **settings, "sym": True, "meta": {"quantizer": "gptqmodel:2"}, **more}


def stored_in(tensors: Mapping[str, torch.Tensor], rows: int, columns: int) -> StoredModule:
    """The module DOWN."""
    names = {suffix: f"{DOWN}.{suffix}" for suffix in tensors}
    by_name = {names[suffix]: tensor for suffix, tensor in tensors.items()}
    return StoredModule(DOWN, rows, columns, names, by_name.__getitem__, lambda name: "model.safetensors")


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (3, 32), (4, -1), (4, 128), (8, 64)])
def test_a_weight_is_what_it_stands_for(
    bits: int, group_size: int, version: str, sym: bool, act_order: bool
) -> None:
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)) / 8
    packed = gptq(group_size, bits, version, sym, act_order)("m", weight)
    assert packed is not None
    format = GptqFormat(bits, group_size, int(version == "gptq"), act_order)
    made = format.convert(stored_in(packed.tensors, *weight.shape))
    assert torch.equal(made.dequantize(), packed.weight)
    assert isinstance(made.zero, int) == sym
    assert (made.permutation is not None) == (act_order and group_size != -1)


@pytest.mark.parametrize(
    ("bits", "group_size", "version", "sym", "act_order"),
    [(4, 16, "gptq", False, True), (3, 32, "gptq_v2", True, False)],
)
def test_a_gptq_checkpoint_is_what_it_stands_for(
    tmp_path: Path, bits: int, group_size: int, version: str, sym: bool, act_order: bool
) -> None:
    settings = config(group_size, bits, version, sym=sym, desc_act=act_order)
    quantize = gptq(group_size, bits, version, sym, act_order)
    check_quantized(write_quantized(tmp_path, settings, quantize, shards=3, num_hidden_layers=1))


def check_weights(written: Checkpoints) -> None:
    weights = read_weights(written.quantized)
    assert weights.keys() >= written.weights.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in written.weights.items())


def test_fields_that_older_checkpoints_lack(tmp_path: Path) -> None:
    settings = {"quant_method": "gptq_marlin", "w_bit": 4, "q_group_size": 32}
    quantize = gptq(32)

    def without_g_idx(name: str, weight: torch.Tensor) -> Stored:
        stored = quantize(name, weight)
        tensors = {suffix: tensor for suffix, tensor in stored.tensors.items() if suffix != "g_idx"}
        return Stored(tensors, stored.weight)

    written = write_quantized(tmp_path, settings, without_g_idx)
    check_weights(written)


def test_dynamic_rules(tmp_path: Path) -> None:
    """q, k and v of one layer differ in bits, group size and order; the first rule that matches decides."""
    rules = {
        r"+:.*q_proj": {"bits": 8, "group_size": 16},
        r".*\.0\.self_attn.k_proj": {"group_size": 64, "desc_act": True},
        r".*k_proj": {},
        r"-:model\.layers\.1\.mlp": {},
        r"-:.*v_proj": {},
        r"self_attn.o_proj": {"bits": 8},  # matches at the start of a name: none
    }

    def quantize(name: str, weight: torch.Tensor) -> Stored | None:
        if name.endswith("q_proj"):
            return gptq(16, 8)(name, weight)
        if name.endswith("0.self_attn.k_proj"):
            return gptq(64, act_order=True)(name, weight)
        if name.endswith("v_proj") or "layers.1.mlp" in name:
            return None
        return gptq(32)(name, weight)

    check_quantized(write_quantized(tmp_path, config(32, dynamic=rules), quantize))


def test_what_is_excluded_wins_over_a_rule_that_stands_before_it(tmp_path: Path) -> None:
    settings = config(32, dynamic={r".*v_proj": {"bits": 8}, r"-:.*\.1\..*v_proj": None})
    written = write_quantized(tmp_path, settings, lambda name, w: None)
    read = read_config(written.quantized)
    assert read.quantization is not None
    formats = [
        read.quantization.format_of(f"model.layers.{layer}.self_attn.v_proj", "Linear") for layer in (0, 1)
    ]
    assert formats[0] is not None
    assert formats[1] is None


@pytest.mark.parametrize(
    "listed",
    [
        [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.down_proj"]],
        ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"],
    ],
)
def test_modules_in_block_to_quantize_are_the_only_ones(tmp_path: Path, listed: list[Any]) -> None:
    quantize = gptq(32)
    written = write_quantized(
        tmp_path,
        config(32, modules_in_block_to_quantize=listed),
        lambda name, w: quantize(name, w) if name.endswith(("q_proj", "k_proj", "down_proj")) else None,
    )
    check_weights(written)


def test_a_quantized_lm_head_and_a_plain_module(tmp_path: Path) -> None:
    quantize = gptq(32)
    written = write_quantized(
        tmp_path,
        config(32, lm_head=True, modules_to_not_convert=["mlp.up_proj"]),
        lambda name, w: None if "up_proj" in name else quantize(name, w),
        modules=(*LINEARS, "lm_head"),
    )
    check_weights(written)


def _group_of_first(group: int) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors["g_idx"].__setitem__(0, group)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t["scales"][1].fill_(float("inf")), r"down_proj.scales has 64 scales that are NaN or inf"),
        (lambda t: t.update(qweight=t["qweight"][:-1]), r"down_proj.qweight has the shape \(15, 64\)"),
        (lambda t: t.update(qzeros=t["qzeros"][:, :-1]), r"down_proj.qzeros has the shape \(4, 7\)"),
        (_group_of_first(4), r"down_proj.g_idx has 1 entries that are not one of the groups 0 to 3"),
        (_group_of_first(-1), r"down_proj.g_idx has 1 entries that are not one of the groups 0 to 3"),
        (_group_of_first(2), r"down_proj.g_idx puts 31 columns into group 0, not 32"),
    ],
)
def test_damage_names_tensor_and_file(
    damage: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    packed = gptq(32)(DOWN, torch.randn(64, 128, generator=torch.Generator().manual_seed(0)))
    assert packed is not None
    tensors = dict(packed.tensors)
    damage(tensors)
    with pytest.raises(ModelLoadError, match=message) as caught:
        GptqFormat(4, 32, 1, True).check(stored_in(tensors, 64, 128))
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("suffix", ["qzeros", "g_idx"])
def test_a_missing_tensor_is_named(tmp_path: Path, suffix: str) -> None:
    quantize = gptq(32)

    def damaged(name: str, weight: torch.Tensor) -> Stored:
        stored = quantize(name, weight)
        tensors = {each: tensor for each, tensor in stored.tensors.items() if (name, each) != (DOWN, suffix)}
        return Stored(tensors, stored.weight)

    written = write_quantized(tmp_path, config(32, desc_act=True), damaged)
    with pytest.raises(ModelLoadError, match=rf"lacks: {DOWN}.{suffix}; searched: model.safetensors"):
        LLM(str(written.quantized), device="cpu", skip_tokenizer_init=True)


@pytest.mark.parametrize(
    ("bits", "group_size", "columns", "message"),
    [
        (4, 48, 128, r"the 128 columns of \S+ are not a multiple of group_size=48"),
        (3, -1, 112, r"down_proj.qweight cannot hold 112 inputs, whose 3 bits each do not fill words of 32"),
    ],
)
def test_sizes_that_do_not_fit(bits: int, group_size: int, columns: int, message: str) -> None:
    tensors = dict.fromkeys(("qweight", "qzeros", "scales"), torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ModelLoadError, match=message) as caught:
        GptqFormat(bits, group_size, 1, False).check(stored_in(tensors, 64, columns))
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bits": 5}, UnsupportedQuantizationError, "with 5 bits is not supported"),
        ({"checkpoint_format": "marlin"}, UnsupportedQuantizationError, "checkpoint_format 'marlin'"),
        ({"is_marlin_format": True}, UnsupportedQuantizationError, "checkpoint_format 'marlin'"),
        ({"pack_dtype": "int16"}, UnsupportedQuantizationError, "packed into int16"),
        ({"dynamic": {"+:x": {"bits": 6}}}, UnsupportedQuantizationError, "with 6 bits"),
        ({"dynamic": {"-:*x": {}}}, ModelLoadError, r"'-:\*x' must be a regular expression"),
        ({"dynamic": {"x": {"group_size": "a"}}}, ModelLoadError, "group_size='a'"),
        ({"group_size": None}, ModelLoadError, "q_group_size"),
        ({"modules_in_block_to_quantize": [[1]]}, ModelLoadError, r"modules_in_block_to_quantize=\[\[1\]\]"),
    ],
)
def test_other_variants_are_refused(
    tmp_path: Path, change: dict[str, Any], error: type[ModelLoadError], message: str
) -> None:
    written = write_quantized(tmp_path, config(32) | change, lambda name, w: None)
    with pytest.raises(error, match=message) as caught:
        read_config(written.quantized)
    assert "config.json" in str(caught.value)
