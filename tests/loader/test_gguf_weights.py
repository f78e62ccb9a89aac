from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf_files import HEADS, HIDDEN, KV_HEADS, base_metadata, random_tensors, write_gguf

from halimede.engine.loader.gguf import GgufWeights, find_gguf_shards
from halimede.errors import ModelLoadError, UnsupportedModelError, UnsupportedQuantizationError

PLAIN = {"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"}
QUANTIZED = [kind for kind in GGMLQuantizationType if kind.name not in PLAIN]
MUST_WORK = {
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_XS",
    "MXFP4",
}


def write_down_proj(path: Path, data: np.ndarray, kind: GGMLQuantizationType) -> Path:
    """A model whose only tensor is blk.0.ffn_down.weight."""
    name = "blk.0.ffn_down.weight"
    metadata = base_metadata() | {"llama.block_count": 1}
    return write_gguf(path, metadata, {name: data}, types={name: kind})


def random_blocks(kind: GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return np.random.default_rng(kind).integers(0, 256, (rows, columns // block * size), np.uint8)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_quantized_types(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    try:
        values = np.random.default_rng(1).standard_normal((7, 256), np.float32)
        data = gguf.quants.quantize(values, kind)
    except NotImplementedError:
        values, data = None, random_blocks(kind, 7, 256)
    weights = GgufWeights([write_down_proj(tmp_path / "m.gguf", data, kind)])
    with np.errstate(all="ignore"):
        try:
            expected = gguf.quants.dequantize(data, kind)
        except NotImplementedError:
            assert kind.name not in MUST_WORK
            with pytest.raises(
                UnsupportedQuantizationError, match=rf"m\.gguf: .*ffn_down\.weight is {kind.name}"
            ):
                weights.get("model.layers.0.mlp.down_proj.weight")
            return
        found = weights.get("model.layers.0.mlp.down_proj.weight")
    assert found.dtype == torch.float32
    assert found.shape == (7, 256)
    np.testing.assert_array_equal(found.numpy(), expected)
    if values is not None and kind.name not in ("TQ1_0", "TQ2_0"):
        assert np.abs(found.numpy() - values).max() < 1.0


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K"])
def test_matrices_larger_than_a_chunk(tmp_path: Path, kind: str) -> None:
    data = random_blocks(GGMLQuantizationType[kind], 601, 512)
    path = write_down_proj(tmp_path / "m.gguf", data, GGMLQuantizationType[kind])
    with np.errstate(all="ignore"):
        found = GgufWeights([path]).get("model.layers.0.mlp.down_proj.weight")
        np.testing.assert_array_equal(found.numpy(), gguf.quants.dequantize(data, GGMLQuantizationType[kind]))


def test_unquantized_types_come_as_they_are(tmp_path: Path) -> None:
    values = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    name = "model.layers.0.mlp.down_proj.weight"
    for kind, dtype in (("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)):
        raw = values.to(dtype).view(torch.uint8).numpy() if kind == "BF16" else values.to(dtype).numpy()
        path = write_down_proj(tmp_path / f"{kind}.gguf", raw, GGMLQuantizationType[kind])
        found = GgufWeights([path]).get(name)
        assert found.dtype == dtype
        assert torch.equal(found, values.to(dtype))


def test_numbers_of_heads_may_be_listed_per_layer(tmp_path: Path) -> None:
    listed = {"llama.attention.head_count": [4, 4], "llama.attention.head_count_kv": [2, 2]}
    tensors = random_tensors()
    plain = write_gguf(tmp_path / "plain.gguf", base_metadata(), tensors)
    lists = write_gguf(tmp_path / "lists.gguf", base_metadata() | listed, tensors)
    name = "model.layers.0.self_attn.k_proj.weight"
    with GgufWeights([plain]) as one, GgufWeights([lists]) as other:
        assert torch.equal(one.get(name), other.get(name))


def permute_like_the_converter(weight: np.ndarray, heads: int) -> np.ndarray:
    """What convert_hf_to_gguf does with q_proj and k_proj of a Llama."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("name", ["attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias"])
def test_permutation_is_undone(tmp_path: Path, name: str) -> None:
    heads = HEADS if "attn_q" in name else KV_HEADS
    rows = HIDDEN // HEADS * heads
    shape = (rows, 32) if name.endswith("weight") else (rows,)
    original = np.random.default_rng(0).standard_normal(shape, np.float32)
    hf_name = f"model.layers.0.self_attn.{name[5]}_proj.{name.split('.')[1]}"
    for kind in ("F32", "Q8_0") if name.endswith("weight") else ("F32",):
        data = gguf.quants.quantize(permute_like_the_converter(original, heads), GGMLQuantizationType[kind])
        types = {f"blk.0.{name}": GGMLQuantizationType[kind]}
        path = write_gguf(tmp_path / f"{kind}.gguf", base_metadata() | {"llama.block_count": 1},
                          {f"blk.0.{name}": data}, types=types)  # fmt: skip
        expected = gguf.quants.dequantize(
            gguf.quants.quantize(original, GGMLQuantizationType[kind]), GGMLQuantizationType[kind]
        )
        np.testing.assert_array_equal(GgufWeights([path]).get(hf_name).numpy(), expected)


def test_permutation_turns_neighbours_into_halves(tmp_path: Path) -> None:
    """ggml rotates rows 2i and 2i + 1 of a head together, Hugging Face rows i and i + D/2."""
    head_dim = HIDDEN // HEADS
    rows = np.arange(HIDDEN, dtype=np.float32)[:, None].repeat(32, 1)
    path = write_gguf(
        tmp_path / "m.gguf", base_metadata() | {"llama.block_count": 1}, {"blk.0.attn_q.weight": rows}
    )
    found = GgufWeights([path]).get("model.layers.0.self_attn.q_proj.weight")[:, 0].reshape(HEADS, head_dim)
    for head in range(HEADS):
        for i in range(head_dim // 2):
            assert found[head, i] == head * head_dim + 2 * i
            assert found[head, i + head_dim // 2] == head * head_dim + 2 * i + 1


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_qwen_is_not_permuted_and_has_all_names(tmp_path: Path, arch: str) -> None:
    tensors = random_tensors(arch)
    weights = GgufWeights([write_gguf(tmp_path / "m.gguf", base_metadata(arch), tensors, arch=arch)])
    for letter in "qkv":
        found = weights.get(f"model.layers.1.self_attn.{letter}_proj.weight").numpy()
        np.testing.assert_array_equal(found, tensors[f"blk.1.attn_{letter}.weight"])
    assert all(name.startswith(("model.", "lm_head.")) for name in weights.names())
    assert len(weights.names()) == len(tensors)
    if arch == "qwen2":
        np.testing.assert_array_equal(
            weights.get("model.layers.0.self_attn.q_proj.bias").numpy(), tensors["blk.0.attn_q.bias"]
        )
    else:
        np.testing.assert_array_equal(
            weights.get("model.layers.0.self_attn.k_norm.weight").numpy(), tensors["blk.0.attn_k_norm.weight"]
        )


def test_names_of_a_llama(tmp_path: Path) -> None:
    tensors = random_tensors() | {
        "rope_freqs.weight": np.ones(8, np.float32),
        "blk.0.surprise.weight": np.ones(8, np.float32),
    }
    with GgufWeights([write_gguf(tmp_path / "m.gguf", base_metadata(), tensors)]) as weights:
        layer = {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
        layer |= {"input_layernorm", "post_attention_layernorm"}
        assert set(weights.names()) == {
            *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
            *(f"model.layers.{i}.{part}.weight" for i in range(2) for part in layer),
            "blk.0.surprise.weight",
        }
        assert weights.where("lm_head.weight") == "m.gguf"
        np.testing.assert_array_equal(
            weights.get("model.layers.1.post_attention_layernorm.weight").numpy(),
            tensors["blk.1.ffn_norm.weight"],
        )
        with pytest.raises(ModelLoadError, match=r"model\.nothing"):
            weights.get("model.nothing")


def test_gemma3_norms_lose_the_one_and_vision_is_left_out(tmp_path: Path) -> None:
    norms = {
        "output_norm.weight": "model.norm",
        "blk.0.ffn_norm.weight": "model.layers.0.pre_feedforward_layernorm",
    }
    tensors = random_tensors("gemma3") | {"v.patch_embd.weight": np.zeros((2, 2), np.float32)}
    tensors |= {"mm.soft_emb_norm.weight": np.zeros(2, np.float32)}
    with GgufWeights(
        [write_gguf(tmp_path / "m.gguf", base_metadata("gemma3"), tensors, arch="gemma3")]
    ) as source:
        for theirs, ours in norms.items():
            assert torch.equal(source.get(f"{ours}.weight"), torch.from_numpy(tensors[theirs]) - 1)
        query = source.get("model.layers.0.self_attn.q_proj.weight")
        assert torch.equal(query, torch.from_numpy(tensors["blk.0.attn_q.weight"]))
        assert not any(name.startswith(("v.", "mm.")) for name in source.names())


def test_wrong_rows_and_layers(tmp_path: Path) -> None:
    tensors = {"blk.0.attn_q.weight": np.zeros((13, 32), np.float32), "blk.1.ffn_norm.weight": np.zeros(4)}
    path = write_gguf(tmp_path / "rows.gguf", base_metadata(), tensors)
    with pytest.raises(ModelLoadError, match=r"rows\.gguf: blk\.0\.attn_q\.weight has 13 rows"):
        GgufWeights([path]).get("model.layers.0.self_attn.q_proj.weight")
    path = write_gguf(
        tmp_path / "layers.gguf", base_metadata() | {"llama.block_count": 10**9}, random_tensors()
    )
    with pytest.raises(ModelLoadError, match=r"layers\.gguf: 1000000000 layers"):
        GgufWeights([path])
    path = write_gguf(tmp_path / "arch.gguf", {"nonesuch.block_count": 0}, arch="nonesuch")
    with pytest.raises(UnsupportedModelError, match=r"arch\.gguf: architecture 'nonesuch'"):
        GgufWeights([path])


def test_shards(tmp_path: Path) -> None:
    tensors = random_tensors()
    write_gguf(tmp_path / "m.gguf", base_metadata(), tensors, split_max_tensors=8)
    names = [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for name in names:
        assert [path.name for path in find_gguf_shards(tmp_path / name)] == names
    paths = find_gguf_shards(tmp_path / names[1])
    weights = GgufWeights(paths)
    assert len(weights.names()) == len(tensors)
    assert {weights.where(name) for name in weights.names()} == set(names)
    np.testing.assert_array_equal(weights.get("lm_head.weight").numpy(), tensors["output.weight"])
    with pytest.raises(ModelLoadError, match=r"m-00001-of-00003\.gguf is one of 3 shards, but 2 were given"):
        GgufWeights(paths[:2])
    with pytest.raises(ModelLoadError, match="are announced"):
        GgufWeights([paths[0], paths[1], paths[1]])
    paths[2].unlink()
    with pytest.raises(ModelLoadError, match=r"lacks m-00003-of-00003\.gguf"):
        find_gguf_shards(tmp_path / names[0])
    with pytest.raises(ModelLoadError, match=r"lacks nothing\.gguf"):
        find_gguf_shards(tmp_path / "nothing.gguf")


def test_real_file(smollm2_gguf: Path) -> None:
    assert find_gguf_shards(smollm2_gguf) == (smollm2_gguf,)
    weights = GgufWeights([smollm2_gguf])
    assert len(weights.names()) == 30 * 9 + 2
    assert all(name.startswith("model.") for name in weights.names())
    expected = {
        "model.embed_tokens.weight": (49152, 576),
        "model.layers.29.self_attn.k_proj.weight": (192, 576),
    }
    for name, shape in expected.items():
        found = weights.get(name)
        assert found.shape == shape
        assert torch.isfinite(found).all()
        assert 0.01 < found.std() < 0.5
