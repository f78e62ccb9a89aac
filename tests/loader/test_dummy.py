"""Random weights in the place of a checkpoint's."""

from pathlib import Path

import pytest
import torch
from tiny_models import read_config, run_model, write_variant

from halimede.engine.config_fields import ConfigFields
from halimede.engine.layers.linear import Linear
from halimede.engine.loader.dummy import fill_with_random_weights
from halimede.engine.models.base import CausalLM
from halimede.engine.models.registry import build_model
from halimede.engine.quant.online import online_scheme
from halimede.engine.quant.registry import read_scheme
from halimede.engine.quant.scheme import QuantScheme


def _model(path: Path, dtype: torch.dtype, quantization: QuantScheme | None = None) -> CausalLM:
    config = read_config(path)
    model = build_model(config)
    fill_with_random_weights(model, device=torch.device("cpu"), dtype=dtype, quantization=quantization)
    model.prepare(torch.device("cpu"), dtype, 256)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["llama-bias", "qwen3", "gemma3", "gemma3-vision"])
def test_logits_are_finite_vary_and_are_the_same_in_the_next_run(
    tmp_path: Path, variant: str, dtype: torch.dtype
) -> None:
    path, tokens = write_variant(tmp_path, variant), list(range(40))
    logits = run_model(_model(path, dtype), tokens)
    assert logits.isfinite().all()
    assert 0.3 < logits.std() < 3
    assert len(set(logits.argmax(dim=-1).tolist())) > 10
    assert torch.equal(run_model(_model(path, dtype), tokens), logits)


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 3, "group_size": 16, "desc_act": True}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP8 = {"quant_method": "fp8", "activation_scheme": "static"}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [16, 16]}
SCHEMES = (
    online_scheme("int8"),
    *(
        read_scheme(ConfigFields({"quantization_config": config}, "config.json"))
        for config in (AWQ, GPTQ, NF4, FP8, BLOCKS)
    ),
)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_weights(tmp_path: Path, scheme: QuantScheme) -> None:
    path, tokens = write_variant(tmp_path, "llama"), list(range(40))
    model = _model(path, torch.bfloat16, scheme)
    forms = [module.form for module in model.modules() if isinstance(module, Linear) and module.form]
    assert len(forms) == 2 * 4  # qkv, o, gate_up, down of each layer
    logits = run_model(model, tokens)
    assert logits.isfinite().all()
    assert 0.3 < logits.std() < 3


def test_norms_are_one_and_biases_zero(tmp_path: Path) -> None:
    model = _model(write_variant(tmp_path, "llama-bias"), torch.bfloat16)
    parameters = dict(model.named_parameters())
    assert {str(p.device) for p in parameters.values()} == {"cpu"}
    assert {p.dtype for p in parameters.values()} == {torch.bfloat16}
    assert (parameters["model.norm.weight"] == 1).all()
    assert (parameters["model.layers.0.self_attn.qkv_proj.bias"] == 0).all()
    gemma = _model(write_variant(tmp_path / "g", "gemma3"), torch.bfloat16)
    assert (gemma.model.norm.weight == 1).all()
    assert gemma.model.norm.weight.dtype == torch.float32
