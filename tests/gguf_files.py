"""Small GGUF files for the tests, written with the gguf package as llama.cpp's converter writes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCAB = 2, 64, 96, 4, 2, 40


def base_metadata(arch: str = "llama") -> dict[str, Any]:
    return {
        f"{arch}.block_count": LAYERS,
        f"{arch}.context_length": 512,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.feed_forward_length": INTERMEDIATE,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.rope.freq_base": 500000.0,
        f"{arch}.rope.dimension_count": HIDDEN // HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def shapes(arch: str = "llama", *, tied: bool = False) -> dict[str, tuple[int, ...]]:
    """GGUF tensor name -> shape (rows first) of a small model."""
    kv = HIDDEN // HEADS * KV_HEADS
    result: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCAB, HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    if not tied:
        result["output.weight"] = (VOCAB, HIDDEN)
    for i in range(LAYERS):
        layer = {
            "attn_norm.weight": (HIDDEN,),
            "ffn_norm.weight": (HIDDEN,),
            "attn_q.weight": (HIDDEN, HIDDEN),
            "attn_k.weight": (kv, HIDDEN),
            "attn_v.weight": (kv, HIDDEN),
            "attn_output.weight": (HIDDEN, HIDDEN),
            "ffn_gate.weight": (INTERMEDIATE, HIDDEN),
            "ffn_up.weight": (INTERMEDIATE, HIDDEN),
            "ffn_down.weight": (HIDDEN, INTERMEDIATE),
        }
        if arch == "qwen2":
            layer |= {"attn_q.bias": (HIDDEN,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
        if arch == "qwen3":
            layer |= {"attn_q_norm.weight": (HIDDEN // HEADS,), "attn_k_norm.weight": (HIDDEN // HEADS,)}
        result |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return result


def random_tensors(arch: str = "llama", *, tied: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes(arch, tied=tied).items()}


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray] | None = None,
    *,
    arch: str | None = "llama",
    types: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    split_max_tensors: int = 0,
) -> Path:
    """Write a file; a tensor named in `types` holds that type's bytes already."""
    writer = gguf.GGUFWriter(path, arch or "", split_max_tensors=split_max_tensors)
    if arch is None:
        for data in writer.kv_data:
            data.clear()
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data, raw_dtype=(types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
