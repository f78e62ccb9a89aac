"""The model that warm-up runs has a layer of every kind, whatever differs between a model's layers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from tiny_models import read_config, write_tiny_checkpoint
from torch import nn

from halimede.engine.loader.outlines import outlines
from halimede.engine.models.config import ModelConfig
from halimede.engine.quant.canonical import GroupedWeight
from halimede.engine.quant.forms.base import UnloadedForm, WeightForm
from halimede.engine.quant.forms.kernel_wna16 import KernelWNA16
from halimede.engine.quant.gguf import GgufScheme
from halimede.engine.quant.gptq import GptqFormat
from halimede.engine.quant.scheme import ModuleKind, QuantScheme, WeightFormat
from halimede.engine.quant.stored import StoredModule
from halimede.engine.warmup.meta_model import meta_models
from halimede.kernels.launch import intercepting
from halimede.kernels.target import TARGETS

_LINEARS = ("mlp.gate_up_proj", "mlp.down_proj", "self_attn.o_proj")


def _config(folder: Path, **overrides: Any) -> ModelConfig:
    path = write_tiny_checkpoint(folder, "LlamaForCausalLM", hidden_size=128, intermediate_size=256)
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**fields, **overrides}))
    return read_config(path)


def _bits(config: ModelConfig) -> list[list[list[int | None]]]:
    """Of each model, of each layer: the bits of the codes of gate and up, down, o."""
    with intercepting(TARGETS["sm_90"], lambda launch: None):
        models = list(meta_models(config, torch.bfloat16))
    return [
        [[_bits_of(layer.get_submodule(name)) for name in _LINEARS] for layer in model.model.layers]
        for model in models
    ]


def _bits_of(linear: nn.Module) -> int | None:
    form = linear.form
    assert form is None or isinstance(form, KernelWNA16)
    return None if form is None else form._operand.facts.bits


def test_layers_that_are_quantized_alike_are_there_once(tmp_path: Path) -> None:
    config = _config(tmp_path, num_hidden_layers=30)
    types: dict[str, str] = {}
    for number in range(30):
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            types[f"model.layers.{number}.{name}"] = "Q4_0"
        types[f"model.layers.{number}.mlp.down_proj"] = "Q8_0" if number % 7 == 3 else "Q4_0"
    types["model.layers.29.self_attn.o_proj"] = "Q8_0"
    config = dataclasses.replace(config, quantization=GgufScheme(types))
    # The last comes a second time, as the one that runs for outputs alone.
    assert _bits(config) == [[[4, 4, None], [4, 8, None], [4, 4, 8], [4, 4, 8]]]


def test_few_layers_are_all_there(tmp_path: Path) -> None:
    config = dataclasses.replace(
        _config(tmp_path), quantization=GgufScheme({"model.layers.1.mlp.down_proj": "Q4_0"})
    )
    assert _bits(config) == [[[None, None, None], [None, 4, None]]]


def test_a_weight_that_embeds_and_gives_logits_is_one_form(tmp_path: Path) -> None:
    config = dataclasses.replace(
        _config(tmp_path, tie_word_embeddings=True),
        quantization=GgufScheme({"model.embed_tokens": "Q4_0"}),
    )
    with intercepting(TARGETS["sm_90"], lambda launch: None):
        [model] = meta_models(config, torch.bfloat16)
        assert isinstance(model.lm_head.form, WeightForm)
        assert model.lm_head.form is model.model.embed_tokens.form
        ids = torch.empty(3, dtype=torch.int64, device="meta")
        assert model.model.embed_tokens(ids).shape == (3, 128)


class _NobodysFormat:
    required = ("weight",)
    optional = ()

    def check(self, stored: StoredModule) -> None: ...

    def convert(self, stored: StoredModule) -> GroupedWeight:
        raise NotImplementedError


class _NobodysScheme:
    method = "nobodys"
    kv_cache_scales = False

    def format_of(self, name: str, kind: ModuleKind) -> WeightFormat | None:
        return _NobodysFormat() if name.endswith("down_proj") else None


def test_a_format_that_is_not_known_launches_nothing(tmp_path: Path) -> None:
    scheme: QuantScheme = _NobodysScheme()
    [model] = meta_models(dataclasses.replace(_config(tmp_path), quantization=scheme), torch.bfloat16)
    for layer in model.model.layers:
        assert isinstance(layer.mlp.down_proj.form, UnloadedForm)
        assert layer.mlp.down_proj(torch.empty(3, 256, device="meta")).shape == (3, 128)
        assert layer.mlp.gate_up_proj.form is None


def test_groups_that_do_not_fit_are_left_to_loading_to_refuse() -> None:
    format_ = GptqFormat(bits=4, group_size=48, zero_shift=1, act_order=False)
    for weight in outlines(format_, 64, 128, torch.bfloat16):
        assert isinstance(weight, GroupedWeight)
        assert weight.group_size == 128
