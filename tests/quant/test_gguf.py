"""GGUF's quantized types that stay quantized, against gguf.quants."""

import logging
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from gguf_files import base_metadata, random_tensors, write_gguf
from quantized_checkpoints import TOKENS
from tiny_models import run_model
from tolerances import QUANTIZED_BFLOAT16, QUANTIZED_LOGITS

from halimede import LLM, ModelLoadError, SamplingParams
from halimede.engine.loader.gguf_config import read_gguf_config
from halimede.engine.loader.gguf_weights import GgufWeights
from halimede.engine.loader.quantized import find_quantized
from halimede.engine.loader.weights import load_weights
from halimede.engine.models.base import CausalLM
from halimede.engine.models.config import ModelConfig
from halimede.engine.models.registry import build_model
from halimede.engine.quant.gguf import TYPES, GgufFormat
from halimede.engine.quant.gguf_types import KEPT_TYPES
from halimede.engine.quant.stored import StoredModule

HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
}
NAMES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def random_blocks(type: str, rows: int, columns: int, seed: int = 0, size: float = 0.01) -> np.ndarray:
    """Any bytes are a tensor of a type, if only its scales are finite and of a size that weights have."""
    block, width = gguf.constants.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, columns // block, width), dtype=np.uint8)
    for start in HALVES.get(type, [0, 2]):
        scales = rng.uniform(0.2 * size, size, raw.shape[:2]).astype(np.float16)
        if type in ("Q4_K", "Q5_K", "Q6_K"):
            scales = (scales / 32).astype(np.float16)
        if type in ("Q4_1", "Q5_1") and start == 2:  # the least weight, where others have a multiple of it
            scales = (scales * (-8 if type == "Q4_1" else -16)).astype(np.float16)
        raw[:, :, start : start + 2] = scales[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


def stored(type: str, raw: np.ndarray, columns: int) -> StoredModule:
    return StoredModule(
        "model.layers.0.mlp.up_proj",
        raw.shape[0],
        columns,
        {"weight": "blk.0.ffn_up.weight"},
        lambda name: torch.from_numpy(raw),
        lambda name: "a.gguf",
    )


@pytest.mark.parametrize("type", list(TYPES))
def test_a_block_is_what_gguf_says(type: str) -> None:
    raw = random_blocks(type, 5, 512)
    expected = torch.from_numpy(dequantize(raw, gguf.GGMLQuantizationType[type]))
    weight = GgufFormat(type).convert(stored(type, raw, 512))
    assert torch.equal(weight.dequantize(), expected)
    assert int(weight.codes.max()) < 1 << weight.bits


def test_the_types_that_are_kept_are_those_that_can_be_read() -> None:
    assert set(KEPT_TYPES) == set(TYPES)


def test_scales_that_are_not_finite_are_refused() -> None:
    raw = random_blocks("Q4_1", 5, 512)
    raw[3, 20:22] = np.array([np.inf], np.float16).view(np.uint8)
    with pytest.raises(ModelLoadError, match=r"a.gguf: the tensor blk.0.ffn_up.weight \(Q4_1\) has 1 scales"):
        GgufFormat("Q4_1").convert(stored("Q4_1", raw, 512))


def write_model(folder: Path, types: dict[str, str], *, hidden: int = 64, plain: bool = False) -> Path:
    """A model of two layers with modules of these types (others are float32), or with what they stand for."""
    tensors, kinds = random_tensors(tied="output" not in types), {}
    for name, tensor in tensors.items():
        tensors[name] = tensor * (0.5 if "embd" in name else 0.1) if tensor.ndim == 2 else 1 + 0.3 * tensor
        part = name.removesuffix(".weight").rpartition(".")[2]
        if tensor.ndim == 2 and part in types:
            type = gguf.GGMLQuantizationType[types[part]]
            raw = random_blocks(types[part], *tensor.shape, seed=len(kinds))
            kinds[name] = type
            tensors[name] = dequantize(raw, type) if plain else raw
    path = folder / f"{'plain' if plain else 'quantized'}.gguf"
    return write_gguf(path, base_metadata(), tensors, types={} if plain else kinds)


def load(path: Path, dtype: torch.dtype) -> CausalLM:
    config = ModelConfig.from_hf(read_gguf_config([path]), str(path))
    model = build_model(config)
    types = {} if config.quantization is None else config.quantization.types  # type: ignore[attr-defined]
    with GgufWeights([path], {f"{name}.weight" for name in types}) as source:
        load_weights(
            model,
            source,
            device=torch.device("cpu"),
            dtype=dtype,
            progress=False,
            quantization=config.quantization,
        )
    model.prepare(torch.device("cpu"), dtype, 256)
    return model


MIXTURES = {
    "all alike": dict.fromkeys((*NAMES, "token_embd"), "Q4_1"),
    "q, k and v each of its own": {"attn_q": "Q4_0", "attn_k": "Q5_0", "attn_v": "Q8_0", "output": "Q8_0"},
    "some plain": {"attn_v": "Q8_0", "ffn_up": "Q5_1", "token_embd": "Q8_0", "output": "Q5_0"},
}


@pytest.mark.parametrize("mixture", list(MIXTURES))
def test_a_model_is_that_of_its_dequantized_weights(tmp_path: Path, mixture: str) -> None:
    """q and k have their rows in another order in a GGUF, which goes for their bytes as well."""
    types = MIXTURES[mixture]
    quantized, plain = (write_model(tmp_path, types, plain=plain) for plain in (False, True))
    tokens = [token % 40 for token in TOKENS]
    logits = {
        (path, dtype): run_model(load(path, dtype), tokens, chunk_size=66).float()
        for path in (quantized, plain)
        for dtype in (torch.float32, torch.bfloat16)
    }
    exact = logits[plain, torch.float32]
    rtol, atol = QUANTIZED_LOGITS
    torch.testing.assert_close(logits[quantized, torch.float32], exact, rtol=rtol, atol=atol)
    errors = [(logits[path, torch.bfloat16] - exact).square().mean().sqrt() for path in (quantized, plain)]
    assert errors[0] < QUANTIZED_BFLOAT16 * errors[1]


def test_generate_from_a_quantized_gguf(tmp_path: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    tokens = []
    for plain in (False, True):
        path = write_model(tmp_path, MIXTURES["all alike"], plain=plain)
        llm = LLM(
            str(path), dtype="float32", device="cpu", skip_tokenizer_init=True, num_gpu_blocks_override=16
        )
        [output] = llm.generate({"prompt_token_ids": [1, 2, 3]}, params, use_tqdm=False)
        tokens.append(list(output.outputs[0].token_ids))
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) == 8


def test_other_types_are_dequantized_and_said_to_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_model(tmp_path, {"ffn_up": "Q8_0", "ffn_down": "IQ4_NL"})
    config = ModelConfig.from_hf(read_gguf_config([path]), str(path))
    found = {
        part.name
        for module in find_quantized(build_model(config), config.quantization)
        for part in module.parts
    }
    assert "model.layers.0.mlp.up_proj" in found
    assert "model.layers.0.mlp.down_proj" not in found
    with caplog.at_level(logging.INFO):
        assert run_model(load(path, torch.float32), [1, 2, 3]).isfinite().all()
    assert "dequantized while they are loaded: 2 of type IQ4_NL" in caplog.text
