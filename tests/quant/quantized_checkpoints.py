"""Tiny quantized checkpoints, and the checks that every format has to pass.

A test gives what its format makes of one weight, packed by hand or by the reference package: the tensors as
they are stored, and the weight that they stand for by the reference. `write_quantized` writes a checkpoint of
such modules beside one of the plain weights that they stand for; `check_quantized` holds the two against each
other, weights bit for bit.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import load_model, read_config, run_model, write_tiny_checkpoint
from tolerances import QUANTIZED_BFLOAT16, QUANTIZED_LOGITS

from halimede import LLM, SamplingParams
from halimede.engine.loader.mapping import plan_loading
from halimede.engine.loader.outlines import outlines
from halimede.engine.loader.quantized import Part, find_quantized
from halimede.engine.loader.safetensors import SafetensorsWeights
from halimede.engine.models.registry import build_model
from halimede.engine.quant.bitsandbytes import FourBitFormat
from halimede.engine.quant.canonical import CanonicalWeight
from halimede.engine.quant.scheme import QuantScheme

SIZES = {"hidden_size": 64, "intermediate_size": 128}
TOKENS = [1, 17, 300, 42, 5, 99, 256, 511, 3, 128, 77, 64, 210, 9, 31, 400, 12, 350, 2, 8, *range(90, 150)]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Stored:
    """One quantized module. tensors: by suffix, as the checkpoint has them; weight: what they stand for,
    [N, K] float32, by the reference."""

    tensors: Mapping[str, torch.Tensor]
    weight: torch.Tensor


Quantize = Callable[[str, torch.Tensor], Stored | None]
"""Of a module's name ("model.layers.0.self_attn.q_proj") and float32 weight; None leaves it plain."""


@dataclass(frozen=True)
class Checkpoints:
    """quantized, plain: directories. weights: of the quantized modules, by name."""

    quantized: Path
    plain: Path
    weights: Mapping[str, torch.Tensor]


def write_quantized(
    folder: Path,
    quantization_config: Mapping[str, Any],
    quantize: Quantize,
    *,
    architecture: str = "LlamaForCausalLM",
    shards: int = 1,
    modules: tuple[str, ...] = LINEARS,
    **overrides: Any,
) -> Checkpoints:
    """Write both checkpoints. modules: last parts of the names of those that `quantize` is asked about."""
    plain = write_tiny_checkpoint(folder / "plain", architecture, **{**SIZES, **overrides})
    tensors = load_file(plain / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        part = quantize(module, tensor) if leaf == "weight" and module.endswith(modules) else None
        if part is None:
            stored[name] = tensor
            continue
        stored |= {f"{module}.{suffix}": each.contiguous() for suffix, each in part.tensors.items()}
        weights[module] = part.weight
    save_file({**tensors, **{f"{m}.weight": w for m, w in weights.items()}}, plain / "model.safetensors")
    quantized = folder / "quantized"
    quantized.mkdir()
    for file in plain.glob("*.json"):
        shutil.copy(file, quantized)
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = dict(quantization_config)
    (quantized / "config.json").write_text(json.dumps(config))
    write_shards(quantized, stored, shards)
    return Checkpoints(quantized, plain, weights)


def write_shards(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int) -> None:
    """Spread tensors over safetensors files, those of one module over several."""
    names = sorted(tensors)
    if shards == 1:
        save_file({name: tensors[name].clone() for name in names}, folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name].clone() for name in names[shard::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[shard::shards], file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_weights(folder: Path, scheme: QuantScheme | None = None) -> dict[str, torch.Tensor]:
    """What our formats make of every quantized module of a checkpoint: by its name, [N, K] float32.

    scheme: one to quantize a plain checkpoint with; None is the checkpoint's own.
    """
    config = read_config(folder)
    model = build_model(config)
    modules = find_quantized(model, scheme or config.quantization)
    with SafetensorsWeights(sorted(folder.glob("*.safetensors"))) as source:
        names = plan_loading(model, source.names(), modules).parts
        weights = {}
        for part in (part for module in modules for part in module.parts):
            weight = part.format.convert(part.stored(names[part.name], source.get, source.where))
            check_outline(part, weight)
            weights[part.name] = weight.dequantize()
        return weights


def check_outline(part: Part, weight: CanonicalWeight) -> None:
    """What is known of a weight without the checkpoint is as it turns out; nothing is of formats not ours."""
    kinds = [
        _kind_of(one)
        for dtype in (torch.float32, torch.bfloat16)  # either may be the model's
        for one in outlines(part.format, part.rows, part.columns, dtype)
    ]
    if not isinstance(part.format, FourBitFormat):  # of whose blocks the checkpoint alone tells the size
        assert not kinds or _kind_of(weight) in kinds, (part.format, _kind_of(weight), kinds)


def _kind_of(weight: CanonicalWeight) -> list[Any]:
    """All that launches hang on: not the numbers in tensors, nor the order of columns."""
    kind: list[Any] = [type(weight).__name__]
    for field in fields(weight):  # type: ignore[arg-type]  # all are dataclasses
        value = getattr(weight, field.name)
        if isinstance(value, torch.Tensor):
            value = (tuple(value.shape), value.dtype if value.is_floating_point() else "integers")
        elif field.name == "static_zero":
            value = value != 0
        if field.name != "permutation":
            kind.append((field.name, value))
    return kind


def check_quantized(checkpoints: Checkpoints, *, logits: bool = True) -> None:
    """Weights equal the reference's bit for bit; logits in float32 and bfloat16, and tokens, agree.

    logits: False for formats that round activations, whose logits have an oracle of their own.
    """
    weights = read_weights(checkpoints.quantized)
    assert set(checkpoints.weights) <= set(weights), "every quantized module is found"
    for name, expected in checkpoints.weights.items():
        assert torch.equal(weights[name], expected.float()), name
    if logits:
        rtol, atol = QUANTIZED_LOGITS
        exact = _logits(checkpoints.plain, torch.float32)
        torch.testing.assert_close(_logits(checkpoints.quantized, torch.float32), exact, rtol=rtol, atol=atol)
        # In bfloat16 both models round: the quantized one must not be further off than the plain one is.
        error = _error(_logits(checkpoints.quantized, torch.bfloat16), exact)
        assert error < QUANTIZED_BFLOAT16 * _error(_logits(checkpoints.plain, torch.bfloat16), exact)
    tokens = [generate(path) for path in (checkpoints.quantized, checkpoints.plain)]
    if logits:
        assert tokens[0] == tokens[1]
    assert len(tokens[0]) == 8


def _logits(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    """Of all tokens; in one chunk few enough for packed products, in the other not."""
    return run_model(load_model(folder, dtype=dtype), TOKENS, chunk_size=66).float()


def _error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    return float((logits - exact).square().mean().sqrt())


def generate(folder: Path, dtype: str = "float32") -> list[int]:
    """Eight greedy tokens through the public API."""
    llm = LLM(
        str(folder), dtype=dtype, device="cpu", skip_tokenizer_init=True, num_gpu_blocks_override=16, seed=0
    )
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    [output] = llm.generate({"prompt_token_ids": TOKENS[:9]}, params, use_tqdm=False)
    return list(output.outputs[0].token_ids)
