"""Quantized models through interpreted Triton kernels: the logits of the CPU's forms, in as few launches as
there can be."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import read_config, run_model, write_tiny_checkpoint
from tolerances import QUANTIZED_KERNELS

from halimede.engine.config_fields import ConfigFields
from halimede.engine.layers.attention_gpu import GpuBackend, TritonAttention
from halimede.engine.layers.attention_torch import TorchBackend
from halimede.engine.loader import weights as loading
from halimede.engine.loader.model_files import ModelFiles
from halimede.engine.models.base import CausalLM
from halimede.engine.models.registry import build_model
from halimede.engine.quant.forms.base import Placement
from halimede.engine.quant.online import online_scheme
from halimede.engine.quant.registry import read_scheme
from halimede.engine.quant.scheme import QuantScheme
from halimede.kernels.interpret import interpret
from halimede.kernels.launch import INTERPRETED_TARGET, Launch, intercepting

CPU = torch.device("cpu")
TOKENS = [1, 17, 300, 42, 5, 99, 256]
STEPS, LAYERS = 2, 2
BLOCK = 128
# Launches of a layer that hang on how its weights are quantized.
_IN_8_BITS = {
    "_scaled_matmul_kernel": 4,
    # Activations are rounded by what makes them, but for attention's.
    "_rms_norm_quant_kernel": 2,
    "_activate_quant_kernel": 1,
    "_quantize_kernel": 1,
    "_rms_norm_kernel": 0,
}
LAUNCHES = {
    "int4": {
        "_wna16_matmul_kernel": 4,
        "_rms_norm_kernel": 2,
        "_activate_kernel": 0,  # at the end of the product
    },
    "int8": _IN_8_BITS,
    "fp8": _IN_8_BITS,
    "fp8 in blocks": _IN_8_BITS,
}


def _in_blocks(path: Path) -> None:
    """Give the layers' weights FP8 codes and a scale for each 128 x 128 of them, as DeepSeek stores them."""
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        blocks = tensors[name].unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
        scales = blocks.abs().amax((1, 3)) / 448.0
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        tensors[name] = codes.view(torch.uint8).flatten(2).flatten(0, 1).view(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
    save_file(tensors, path / "model.safetensors")


def _scheme(method: str) -> QuantScheme | None:
    if method != "fp8 in blocks":
        return online_scheme(method)
    settings = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    return read_scheme(ConfigFields({"quantization_config": settings}, "config.json"))


def _load(path: Path, method: str, monkeypatch: pytest.MonkeyPatch, *, kernels: bool) -> CausalLM:
    def place(device: torch.device, dtype: torch.dtype) -> Placement:
        return Placement(device, dtype, interpreted=kernels)

    monkeypatch.setattr(loading, "Placement", place)
    model = build_model(read_config(path))
    files = ModelFiles(str(path), "safetensors", (path / "model.safetensors",), {}, str(path))
    with loading.open_weights(files) as source:
        loading.load_weights(
            model,
            source,
            device=CPU,
            dtype=torch.bfloat16,
            progress=False,
            quantization=_scheme(method),
        )
    backend = GpuBackend(TritonAttention(256, 4)) if kernels else TorchBackend()
    model.prepare(CPU, torch.bfloat16, 256, backend=backend)
    return model


@pytest.mark.parametrize("method", LAUNCHES)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_logits_and_launches(
    architecture: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"intermediate_size": 128}
    if method == "fp8 in blocks":
        sizes = {"hidden_size": 2 * BLOCK, "intermediate_size": 2 * BLOCK, "head_dim": 64}
    path = write_tiny_checkpoint(tmp_path, architecture, **sizes)
    if method == "fp8 in blocks":
        _in_blocks(path)
    launched: Counter[str] = Counter()

    def run(launch: Launch) -> None:
        launched[launch.kernel.__name__] += 1
        interpret(launch.kernel, launch.grid, launch.args, dict(launch.constants))

    with intercepting(INTERPRETED_TARGET, run):
        model = _load(path, method, monkeypatch, kernels=True)
        logits = run_model(model, TOKENS, chunk_size=len(TOKENS) - 1).float()
    expected = run_model(_load(path, method, monkeypatch, kernels=False), TOKENS).float()
    error = (logits - expected).square().mean().sqrt() / expected.std()
    assert error < QUANTIZED_KERNELS[method]
    final_norms = {"_rms_norm_kernel": STEPS}
    for name, count in LAUNCHES[method].items():
        assert launched[name] == STEPS * LAYERS * count + final_norms.get(name, 0), name
