"""What the loader does with quantized modules, whatever their format: here AWQ."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_checkpoints import TOKENS, Stored, check_quantized, generate, write_quantized
from safetensors.torch import load_file, save_file
from test_awq import awq, config
from tiny_models import load_model, run_model

from halimede import LLM, ModelLoadError, SamplingParams
from halimede.engine.models.config import ModelConfig

Q_PROJ = "model.layers.0.self_attn.q_proj"


def change(folder: Path, **tensors: torch.Tensor) -> None:
    """Add tensors to a checkpoint; a dot in a name is written as two underscores."""
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name.replace("__", "."): each for name, each in tensors.items()}, path)


def open_llm(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), device="cpu", skip_tokenizer_init=True, num_gpu_blocks_override=16, **options)


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    return write_quantized(tmp_path, config(32), awq(32)).quantized


def test_zero_biases_of_modules_that_have_none_are_left_out(quantized: Path) -> None:
    """AutoGPTQ wrote them for every linear module."""
    before = generate(quantized)
    change(quantized, model__layers__0__self_attn__q_proj__bias=torch.zeros(64))
    assert generate(quantized) == before


def test_other_biases_are_an_error(quantized: Path) -> None:
    change(quantized, model__layers__0__self_attn__q_proj__bias=torch.full((64,), 0.5))
    with pytest.raises(ModelLoadError, match=rf"{Q_PROJ}.bias is a bias that is not zero"):
        open_llm(quantized)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model__layers__1__self_attn__k_scale", "model__layers__1__self_attn__v_scale"),
        ("model__layers__1__self_attn__k_proj__k_scale", "model__layers__1__self_attn__v_proj__v_scale"),
        ("model__layers__1__self_attn__qkv_proj__k_scale", "model__layers__1__self_attn__qkv_proj__v_scale"),
        (
            "model__layers__1__self_attn__k_proj__output_scale",
            "model__layers__1__self_attn__v_proj__output_scale",
        ),
    ],
)
def test_scales_of_the_kv_cache(quantized: Path, key: str, value: str) -> None:
    change(quantized, **{key: torch.tensor(0.25), value: torch.tensor([0.5])})
    assert load_model(quantized).kv_scales == [(1.0, 1.0), (0.25, 0.5)]


def test_one_scale_for_keys_and_values_and_one_that_was_never_set(quantized: Path) -> None:
    change(
        quantized,
        model__layers__0__self_attn__kv_scale=torch.tensor(0.125),
        model__layers__1__self_attn__k_scale=torch.tensor(-1.0),
        model__layers__1__self_attn__q_scale=torch.tensor(3.0),
    )
    assert load_model(quantized).kv_scales == [(0.125, 0.125), (1.0, 1.0)]


@pytest.mark.parametrize("scale", [torch.tensor(0.0), torch.tensor(float("nan")), torch.ones(2)])
def test_a_scale_that_cannot_be(quantized: Path, scale: torch.Tensor) -> None:
    change(quantized, model__layers__0__self_attn__k_scale=scale)
    with pytest.raises(ModelLoadError, match=r"model.safetensors: .*k_scale must be one positive number"):
        open_llm(quantized)


def test_an_8_bit_kv_cache_is_scaled_as_the_checkpoint_says(quantized: Path) -> None:
    """The kernels are interpreted. A scale that keys and values leave is not the same as one that fits."""
    options = {
        "dtype": "float32",
        "attention_backend": "triton",
        "kv_cache_dtype": "fp8",
        "max_model_len": 32,
    }
    plain = tokens(quantized, **options)
    for layer in range(2):
        scales = {f"model__layers__{layer}__self_attn__{kind}_scale": torch.tensor(1e-3) for kind in "kv"}
        change(quantized, **scales)
    assert tokens(quantized, **options) != plain, "everything is cut off at 448 / 1000"
    assert tokens(quantized, dtype="float32", max_model_len=32) == tokens(quantized, dtype="float32")


def tokens(folder: Path, **options: Any) -> list[int]:
    with open_llm(folder, **options) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
        [output] = llm.generate({"prompt_token_ids": [5, 17, 300, 42]}, params, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def test_parts_of_a_fused_module_may_differ(tmp_path: Path) -> None:
    """Of q, k and v one is plain; and of gate and up."""
    quantize = awq(32)

    def some(name: str, weight: torch.Tensor) -> Stored | None:
        return None if name.endswith(("k_proj", "up_proj")) else quantize(name, weight)

    excluded = ["k_proj", "up_proj"]
    check_quantized(write_quantized(tmp_path, config(32, modules_to_not_convert=excluded), some))


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM"])
def test_other_architectures(tmp_path: Path, architecture: str) -> None:
    """Biases, norms of heads, a tied and scaled embedding, windows."""
    options: dict[str, Any] = {}
    if architecture.startswith("Gemma3"):
        options = {"tie_word_embeddings": True, "sliding_window": 8, "num_hidden_layers": 6}
    check_quantized(write_quantized(tmp_path, config(32), awq(32), architecture=architecture, **options))


def test_the_names_of_a_model_that_also_sees(tmp_path: Path) -> None:
    """Its text part is quantized, and lists its modules under its own names."""
    excluded = ["language_model.model.layers.0.mlp"]
    written = write_quantized(
        tmp_path,
        config(32, modules_to_not_convert=excluded),
        lambda name, weight: None if ".layers.0.mlp." in name else awq(32)(name, weight),
    )
    for folder in (written.quantized, written.plain):
        path = folder / "model.safetensors"
        save_file({f"language_model.{name}": each for name, each in load_file(path).items()}, path)
    check_quantized(written)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_that_is_overwritten_does_not_change_a_running_model(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """One group a row: the scales of such a weight are laid out as the file has them."""
    quantized = write_quantized(tmp_path, config(-1), awq(-1)).quantized
    model = load_model(quantized, dtype=dtype)
    before = run_model(model, TOKENS)
    path = quantized / "model.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(run_model(model, TOKENS), before)


def test_a_quantized_model_says_how_in_its_config(quantized: Path) -> None:
    config = ModelConfig.from_hf(json.loads((quantized / "config.json").read_text()), "config.json")
    assert config.quantization is not None
    assert config.quantization.method == "awq"
