"""Every family through the whole engine: 8 prompts, 64 greedy tokens, against transformers in float32."""

import json
import random
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import VARIANTS, write_tiny_checkpoint, write_variant

from halimede import LLM, SamplingParams

NEW_TOKENS = 64
LENGTHS = (1, 3, 16, 17, 31, 40, 64, 90)


def assert_tokens_of_transformers(reference: str, checkpoint: Path) -> None:
    """What LLM(reference) generates is what transformers would, with the weights in `checkpoint`."""
    from transformers import AutoModelForCausalLM

    rng = random.Random(4)
    prompts = [[rng.randrange(3, 400) for _ in range(length)] for length in LENGTHS]
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    with LLM(reference, dtype="float32", skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 23) as llm:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for prompt, output in zip(prompts, outputs, strict=True):
        ours = list(output.outputs[0].token_ids)
        assert len(ours) == NEW_TOKENS
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + ours])).logits[0]
        # transformers' choice after each of our prefixes: equal everywhere means equal from the start.
        assert ours == logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist()
    assert len({tuple(o.outputs[0].token_ids[-8:]) for o in outputs}) > 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_are_those_of_transformers(tmp_path: Path, variant: str) -> None:
    path = write_variant(tmp_path, variant)
    assert_tokens_of_transformers(str(path), path)


@pytest.mark.parametrize(("format_", "shards"), [("bin", 1), ("bin", 3), ("safetensors", 3)])
def test_in_every_file_format(tmp_path: Path, format_: str, shards: int) -> None:
    path = write_tiny_checkpoint(tmp_path, "Qwen2ForCausalLM", seed=5, format=format_, shards=shards)
    assert_tokens_of_transformers(str(path), path)


@pytest.mark.parametrize("variant", ["gemma3", "gemma3-defaults", "llama", "llama-tied", "qwen2", "qwen3"])
def test_as_a_gguf(tmp_path: Path, variant: str) -> None:
    path = write_variant(tmp_path / "original", variant)
    assert_tokens_of_transformers(str(write_as_gguf(path, tmp_path / "model.gguf")), path)


def write_as_gguf(checkpoint: Path, path: Path) -> Path:
    """The checkpoint as llama.cpp's converter writes it, in float32."""
    config = json.loads((checkpoint / "config.json").read_text())
    arch, layers = config["model_type"].removesuffix("_text"), config["num_hidden_layers"]
    rope = config["rope_parameters"]
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if arch == "gemma3":
        rope = rope["full_attention"]
        writer.add_sliding_window(config["sliding_window"])
        if layers < 6:  # the default pattern has a layer that sees everything in every six
            writer.add_sliding_window_pattern([t == "sliding_attention" for t in config["layer_types"]])
            writer.add_float32("gemma3.rope.freq_base_swa", 100.0)
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_eos_token_id(config["eos_token_id"])
    (model_arch,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(model_arch, layers)
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        part = name.split(".")[-2]
        if arch == "llama" and part in heads:  # llama.cpp rotates neighbours, Hugging Face halves
            tensor = tensor.unflatten(0, (heads[part], 2, -1)).transpose(1, 2).flatten(0, 2)
        if arch == "gemma3" and part.endswith("norm"):
            tensor = tensor + 1
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None
        writer.add_tensor(gguf_name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_types_on_a_cpu(tmp_path: Path, dtype: str) -> None:
    """The whole engine in the type; greedy tokens agree with float32 until two are nearly as likely."""
    path = write_variant(tmp_path, "qwen3" if dtype == "float16" else "gemma3")
    prompts = [{"prompt_token_ids": list(range(3, 3 + length))} for length in (1, 20, 40)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)

    def generate(dtype: str) -> list:
        with LLM(str(path), dtype=dtype, skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 23) as llm:
            return [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]

    for half, exact in zip(generate(dtype), generate("float32"), strict=True):
        assert len(half.token_ids) == 8
        (one,), (other,) = (list(o.logprobs[0].values())[:1] for o in (half, exact))
        assert one.logprob == pytest.approx(other.logprob, abs=0.02 if dtype == "float16" else 0.2)
