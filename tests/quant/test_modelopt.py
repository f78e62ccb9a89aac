"""ModelOpt checkpoints, quantized here as ModelOpt does: its FP8 is the largest magnitude over 448."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_checkpoints import Stored, check_quantized, write_quantized
from tiny_models import load_model, read_config

from halimede import LLM, ModelLoadError, UnsupportedQuantizationError


def per_tensor(name: str, weight: torch.Tensor) -> Stored:
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    tensors = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.05)}
    return Stored(tensors, codes.float() * scale)


def per_row(name: str, weight: torch.Tensor) -> Stored:
    scale = weight.abs().amax(1) / 448
    codes = (weight / scale[:, None]).to(torch.float8_e4m3fn)
    return Stored({"weight": codes, "weight_scale": scale}, codes.float() * scale[:, None])


def config(**settings: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"], **settings}


def test_an_fp8_checkpoint_is_what_it_stands_for(tmp_path: Path) -> None:
    written = write_quantized(tmp_path, config(kv_cache_quant_algo="FP8"), per_tensor, shards=2)
    check_quantized(written)
    scheme = read_config(written.quantized).quantization
    assert scheme is not None
    assert scheme.kv_cache_scales


def test_a_scale_for_each_row_and_excluded_modules(tmp_path: Path) -> None:
    settings = config(quant_algo="FP8_PER_CHANNEL_PER_TOKEN", exclude_modules=["*layers.1.mlp*", "*v_proj"])
    written = write_quantized(
        tmp_path,
        settings,
        lambda name, w: None if "layers.1.mlp" in name or "v_proj" in name else per_row(name, w),
    )
    assert len(written.weights) == 14 - 2 - 3
    check_quantized(written)


def test_settings_in_a_file_of_their_own(tmp_path: Path) -> None:
    """And no list of excluded modules, as of ModelOpt's first versions: lm_head is plain."""
    written = write_quantized(tmp_path, config(), per_tensor, num_hidden_layers=1)
    path = written.quantized / "config.json"
    whole = json.loads(path.read_text())
    del whole["quantization_config"]
    path.write_text(json.dumps(whole))
    settings = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "group_size": None}}
    (written.quantized / "hf_quant_config.json").write_text(json.dumps(settings))
    llm = LLM(str(written.quantized), device="cpu", dtype="float32", skip_tokenizer_init=True)
    [output] = llm.generate({"prompt_token_ids": [1, 2, 3]}, use_tqdm=False)
    assert output.outputs[0].token_ids


def test_damage_names_tensor_and_file(tmp_path: Path) -> None:
    def damaged(name: str, weight: torch.Tensor) -> Stored:
        stored = per_tensor(name, weight)
        return Stored({**stored.tensors, "input_scale": torch.tensor(torch.nan)}, stored.weight)

    written = write_quantized(tmp_path, config(), damaged, num_hidden_layers=1)
    with pytest.raises(ModelLoadError, match=r"model.safetensors: .*_proj.input_scale has 1 scales"):
        load_model(written.quantized)


@pytest.mark.parametrize("algorithm", ["NVFP4", "W4A8_AWQ", "MIXED_PRECISION"])
def test_other_algorithms_are_refused(tmp_path: Path, algorithm: str) -> None:
    written = write_quantized(tmp_path, config(quant_algo=algorithm), lambda *_: None, num_hidden_layers=1)
    with pytest.raises(
        UnsupportedQuantizationError,
        match=f"quant_algo='{algorithm}' is not supported; supported: FP8, FP8_PER_CHANNEL_PER_TOKEN",
    ):
        read_config(written.quantized)
