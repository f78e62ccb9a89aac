"""Which architectures there are, and what a built model looks like before it is loaded."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import read_config, write_tiny_checkpoint

from halimede.engine.loader.mapping import plan_loading
from halimede.engine.models.base import CausalLM
from halimede.engine.models.registry import SUPPORTED_ARCHITECTURES, build_model, model_class
from halimede.errors import UnsupportedModelError


@pytest.mark.parametrize("architecture", SUPPORTED_ARCHITECTURES)
def test_every_architecture_has_a_class_of_its_name(architecture: str) -> None:
    found = model_class(architecture)
    assert issubclass(found, CausalLM)
    assert found.__name__ == architecture


def test_an_unknown_architecture_names_the_supported_ones() -> None:
    with pytest.raises(UnsupportedModelError, match="'GPT2LMHeadModel' is not supported") as e:
        model_class("GPT2LMHeadModel")
    assert all(name in str(e.value) for name in SUPPORTED_ARCHITECTURES)


def test_a_model_is_built_without_memory_and_with_hugging_face_names(tmp_path: Path) -> None:
    model = build_model(read_config(write_tiny_checkpoint(tmp_path, "Qwen2ForCausalLM")))
    parameters = dict(model.named_parameters())
    assert {parameter.device for parameter in parameters.values()} == {torch.device("meta")}
    assert not any(parameter.requires_grad for parameter in parameters.values())
    layer = {
        "input_layernorm.weight": (64,),
        "mlp.down_proj.weight": (64, 112),
        "mlp.gate_up_proj.weight": (224, 64),
        "post_attention_layernorm.weight": (64,),
        "self_attn.o_proj.weight": (64, 64),
        "self_attn.qkv_proj.bias": (128,),
        "self_attn.qkv_proj.weight": (128, 64),
    }
    expected = {f"model.layers.{i}.{name}": shape for i in (0, 1) for name, shape in layer.items()}
    expected |= {
        "lm_head.weight": (512, 64),
        "model.embed_tokens.weight": (512, 64),
        "model.norm.weight": (64,),
    }
    assert {name: tuple(parameter.shape) for name, parameter in parameters.items()} == expected
    assert model.model.layers[0].self_attn.qkv_proj.output_sizes == (64, 32, 32)
    assert model.packed_modules["qkv_proj"] == ("q_proj", "k_proj", "v_proj")


def test_a_tied_model_needs_no_lm_head_and_may_have_one_in_the_checkpoint(tmp_path: Path) -> None:
    tied = build_model(
        read_config(write_tiny_checkpoint(tmp_path, "LlamaForCausalLM", tie_word_embeddings=True))
    )
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "lm_head.weight" not in names
    for given in (names, names | {"lm_head.weight"}):
        plan = plan_loading(tied, given)
        assert (plan.missing, plan.unexpected) == ((), ())


def test_running_before_prepare_says_so(tmp_path: Path) -> None:
    model = build_model(read_config(write_tiny_checkpoint(tmp_path, "LlamaForCausalLM")))
    with pytest.raises(AssertionError, match="prepare was not called"):
        model.model.rotary_emb(torch.tensor([0]))
