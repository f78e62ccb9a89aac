"""bitsandbytes checkpoints, packed here as its functional.py does and, where it is installed, by it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_checkpoints import LINEARS, Stored, check_quantized, read_weights, write_quantized
from tiny_models import read_config

from halimede import LLM, ModelLoadError, UnsupportedQuantizationError
from halimede.engine.quant.bitsandbytes import FourBitFormat, Int8Format
from halimede.engine.quant.stored import StoredModule

DOWN = "model.layers.0.mlp.down_proj"
# functional.get_4bit_type
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635)
NF4 += (-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725)
NF4 += (0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941)
NF4 += (0.7229568362236023, 1.0)
FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3)
TABLES = {"nf4": torch.tensor(NF4), "fp4": torch.tensor((*FP4, *(-value for value in FP4))) / 12}


def as_bytes(state: Mapping[str, Any]) -> torch.Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def four_bit(weight: torch.Tensor, quant_type: str = "nf4", block: int = 64, nested: bool = False) -> Stored:
    """As functional.quantize_4bit: blocks of the rows in a row, the first of two codes in the high bits."""
    table = TABLES[quant_type]
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % block)).view(-1, block)
    absmax = flat.abs().amax(1)
    state = {"quant_type": quant_type, "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)}
    tensors = {"weight.absmax": absmax, "weight.quant_map": table}
    if nested:
        absmax, tensors["weight.absmax"], outer = nest(absmax, block=3)
        state |= {"nested_blocksize": 3, "nested_dtype": "float32", "nested_offset": float(outer["offset"])}
        tensors |= {"weight.nested_absmax": outer["absmax"], "weight.nested_quant_map": outer["map"]}
    codes = ((flat / absmax[:, None])[..., None] - table).abs().argmin(-1)
    values = (table[codes] * absmax[:, None]).flatten()[: weight.numel()]
    codes = codes.to(torch.uint8).flatten()[: weight.numel() + weight.numel() % 2]
    tensors["weight"] = (codes[::2] << 4 | codes[1::2])[:, None]
    tensors[f"weight.quant_state.bitsandbytes__{quant_type}"] = as_bytes(state)
    return Stored(tensors, values.view(weight.shape))


def nest(absmax: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Scales as they are read, their codes, the rest; as functional.quantize_blockwise, by another map."""
    offset, values = absmax.mean(), torch.linspace(-1, 1, 256)
    outer = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % block)).view(-1, block).abs().amax(1)
    wide = outer.repeat_interleave(block)[: len(absmax)]
    codes = (((absmax - offset) / wide.clamp(min=1e-9))[:, None] - values).abs().argmin(1)
    read = values[codes] * wide + offset
    return read, codes.to(torch.uint8), {"absmax": outer, "map": values, "offset": offset}


def int8(weight: torch.Tensor) -> Stored:
    """As functional.int8_vectorwise_quant."""
    largest = weight.abs().amax(1)
    codes = (weight * (127 / largest[:, None])).round().to(torch.int8)
    tensors = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return Stored(tensors, codes.float() * (largest / 127)[:, None])


def config4(quant_type: str = "nf4", **more: Any) -> dict[str, Any]:
    settings = {"load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": quant_type}
    return {"quant_method": "bitsandbytes", **settings, "llm_int8_skip_modules": None, **more}


def config8(**more: Any) -> dict[str, Any]:
    return {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True, **more}


def stored_in(tensors: Mapping[str, torch.Tensor], rows: int, columns: int) -> StoredModule:
    """The module DOWN."""
    names = {suffix: f"{DOWN}.{suffix}" for suffix in tensors}
    by_name = {names[suffix]: tensor for suffix, tensor in tensors.items()}
    return StoredModule(DOWN, rows, columns, names, by_name.__getitem__, lambda name: "model.safetensors")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("rows", "columns", "block", "group"),
    [(64, 128, 64, 64), (48, 96, 64, 32), (33, 80, 32, 16), (7, 33, 32, 1), (32, 64, 256, 64)],
)
def test_a_weight_is_what_it_stands_for(
    rows: int, columns: int, block: int, group: int, quant_type: str, nested: bool
) -> None:
    """Blocks that go on from one row to the next too, and the last of them not full."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    packed = four_bit(weight, quant_type, block, nested)
    made = FourBitFormat(quant_type).convert(stored_in(packed.tensors, rows, columns))
    assert made.group_size == group
    assert torch.equal(made.dequantize(), packed.weight)


@pytest.mark.parametrize(
    "lay",
    [
        lambda packed: packed.t(),
        lambda packed: packed.view(-1),
        lambda packed: packed.view(48, 64),
        lambda packed: packed.view(-1).view(torch.bfloat16)[:, None],
        lambda packed: packed.view(-1).view(torch.float32).view(48, 16),
    ],
)
def test_codes_may_lie_in_other_shapes_and_types(lay: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    packed = four_bit(weight)
    tensors = {**packed.tensors, "weight": lay(packed.tensors["weight"])}
    made = FourBitFormat("nf4").convert(stored_in(tensors, 48, 128))
    assert torch.equal(made.dequantize(), packed.weight)


def test_a_4_bit_checkpoint_is_what_it_stands_for(tmp_path: Path) -> None:
    """q, k and v differ in their blocks, or are plain."""

    def quantize(name: str, weight: torch.Tensor) -> Stored | None:
        if name.endswith("1.self_attn.v_proj"):
            return None
        return four_bit(weight, block=32 if name.endswith("k_proj") else 64, nested="layers.0" in name)

    written = write_quantized(
        tmp_path,
        config4(llm_int8_skip_modules=["lm_head", "model.layers.1.self_attn.v_proj"]),
        quantize,
        shards=3,
        intermediate_size=96,
    )
    check_quantized(written)


def test_an_8_bit_checkpoint_is_what_it_stands_for(tmp_path: Path) -> None:
    def quantize(name: str, weight: torch.Tensor) -> Stored:
        packed = int8(weight)
        if name.endswith("k_proj"):  # bitsandbytes did not always write its format
            packed = Stored({suffix: packed.tensors[suffix] for suffix in ("weight", "SCB")}, packed.weight)
        return packed

    # Of one layer: with two the plain model in bfloat16 is further from float32 than the tolerance.
    check_quantized(write_quantized(tmp_path, config8(), quantize, shards=3, num_hidden_layers=1))


@pytest.mark.parametrize(("skipped", "quantized"), [(None, False), (["o_proj"], True), (["lm_head"], False)])
def test_lm_head_is_plain_unless_a_list_leaves_it_out(
    tmp_path: Path, skipped: list[str] | None, quantized: bool
) -> None:
    plain = skipped or ["lm_head"]
    written = write_quantized(
        tmp_path,
        config4("fp4", llm_int8_skip_modules=skipped),
        lambda name, w: None if name.endswith(tuple(plain)) else four_bit(w, "fp4"),
        modules=(*LINEARS, "lm_head"),
    )
    weights = read_weights(written.quantized)
    assert ("lm_head" in weights) == quantized
    assert all(torch.equal(weights[name], weight) for name, weight in written.weights.items())


def test_four_bits_as_the_package_has_them() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    for quant_type in ("nf4", "fp4"):
        for nested in (False, True):
            packed, state = functional.quantize_4bit(
                weight, blocksize=64, compress_statistics=nested, quant_type=quant_type
            )
            tensors = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
            made = FourBitFormat(quant_type).convert(stored_in({"weight": packed, **tensors}, 48, 256))
            assert torch.equal(made.dequantize(), functional.dequantize_4bit(packed, state))


def test_eight_bits_as_the_package_has_them() -> None:
    """It multiplies with 1 / 127 last: the last bit differs."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    made = Int8Format().convert(stored_in({"weight": codes, "SCB": scales}, 48, 256))
    expected = functional.int8_vectorwise_dequant(codes, scales)
    torch.testing.assert_close(made.dequantize(), expected, rtol=3e-7, atol=0)


def _without(suffix: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(suffix)


def _stating(**changes: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = "weight.quant_state.bitsandbytes__nf4"
        tensors[name] = as_bytes(json.loads(bytes(tensors[name].tolist())) | changes)

    return change


def _cut(suffix: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__setitem__(suffix, tensors[suffix][:-1])


STATE = r"down_proj.weight.quant_state.bitsandbytes__nf4"
DAMAGE_4 = [
    (_without("weight.nested_quant_map"), rf"{STATE} .* there is no {DOWN}.weight.nested_quant_map"),
    (_without("weight.nested_absmax"), rf"{STATE} .* there is no {DOWN}.weight.nested_absmax"),
    (lambda t: t["weight.nested_absmax"].fill_(float("nan")), r"nested_absmax has 43 scales that are NaN"),
    (lambda t: t["weight.quant_map"][2].fill_(float("inf")), r"quant_map has 1 scales that are NaN or inf"),
    (_cut("weight"), r"down_proj.weight has the shape \(4095, 1\)"),
    (_cut("weight.absmax"), r"down_proj.weight.absmax has the shape \(127,\)"),
    (lambda t: t.update(weight=t["weight"].int()), r"down_proj.weight is of type int32"),
    (_cut(STATE.removeprefix("down_proj.")), rf"{STATE} does not describe a quantized weight"),
    (_stating(blocksize=0), rf"{STATE} does not describe a quantized weight: blocksize is 0"),
    (_stating(nested_offset=float("nan")), rf"{STATE} does not describe .* nested_offset is nan"),
    (_stating(shape=[128, 64]), rf"{STATE} has shape=\[128, 64\], and the model \[64, 128\]"),
    (_stating(quant_type="fp4"), rf"{STATE} has quant_type='fp4', and the config 'nf4'"),
]
DAMAGE_8 = [
    (lambda t: t["SCB"][3].fill_(float("inf")), r"down_proj.SCB has 1 scales that are NaN or infinite"),
    (_cut("weight"), r"down_proj.weight has the shape \(63, 128\)"),
    (lambda t: t.update(weight=t["weight"].view(torch.uint8)), r"down_proj.weight is of type uint8"),
    (lambda t: t["weight_format"].fill_(2), r"down_proj.weight_format is 2, a layout"),
]


@pytest.mark.parametrize(
    ("bits", "damage", "message"),
    [*((4, *each) for each in DAMAGE_4), *((8, *each) for each in DAMAGE_8)],
)
def test_damage_names_tensor_and_file(
    bits: int, damage: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    packed = four_bit(weight, nested=True) if bits == 4 else int8(weight)
    tensors = {suffix: tensor.clone() for suffix, tensor in packed.tensors.items()}
    damage(tensors)
    format = FourBitFormat("nf4") if bits == 4 else Int8Format()
    with pytest.raises(ModelLoadError, match=message) as caught:
        format.check(stored_in(tensors, 64, 128))
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(("bits", "suffix"), [(4, "weight.quant_state.bitsandbytes__nf4"), (8, "SCB")])
def test_a_missing_tensor_is_named(tmp_path: Path, bits: int, suffix: str) -> None:
    def damaged(name: str, weight: torch.Tensor) -> Stored:
        stored = four_bit(weight) if bits == 4 else int8(weight)
        tensors = {each: tensor for each, tensor in stored.tensors.items() if (name, each) != (DOWN, suffix)}
        return Stored(tensors, stored.weight)

    written = write_quantized(tmp_path, config4() if bits == 4 else config8(), damaged)
    with pytest.raises(ModelLoadError, match=rf"lacks: {DOWN}.{suffix}; searched: model.safetensors"):
        LLM(str(written.quantized), device="cpu", skip_tokenizer_init=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bnb_4bit_quant_type": "int4"}, UnsupportedQuantizationError, "bnb_4bit_quant_type 'int4'"),
        ({"load_in_8bit": True}, ModelLoadError, "load_in_4bit=True and load_in_8bit=True"),
        ({"load_in_4bit": None}, ModelLoadError, "load_in_4bit=False and load_in_8bit=False"),
        ({"llm_int8_skip_modules": "lm_head"}, ModelLoadError, "must be a list of strings"),
    ],
)
def test_other_variants_are_refused(
    tmp_path: Path, change: dict[str, Any], error: type[ModelLoadError], message: str
) -> None:
    written = write_quantized(tmp_path, config4() | change, lambda name, w: None)
    with pytest.raises(error, match=message) as caught:
        read_config(written.quantized)
    assert "config.json" in str(caught.value)
