"""Checkpoints of two layers, made and judged with transformers' own classes, and our model run on them.

transformers takes seconds to import, so it is imported where it is used.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from halimede.engine.layers.attention_step import Backend
from halimede.engine.loader.model_files import ModelFiles
from halimede.engine.loader.weights import load_weights, open_weights
from halimede.engine.model_input import AttentionMetadata, KVCache, ModelInput
from halimede.engine.models.base import CausalLM
from halimede.engine.models.config import ModelConfig
from halimede.engine.models.registry import build_model

VOCAB_SIZE = 512
BOS_TOKEN_ID, EOS_TOKEN_ID = 1, 2

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_WINDOW_FROM_LAYER_1 = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}

_GEMMA3 = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "num_hidden_layers": 3,
    "query_pre_attn_scalar": 24,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}
_GEMMA3_DEFAULTS = {"num_hidden_layers": 6, "sliding_window": 8, "tie_word_embeddings": True}
_VISION_MODULES = ("model.vision_tower.", "model.multi_modal_projector.")
_TINY_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gemma3": ("Gemma3ForCausalLM", _GEMMA3),
    "gemma3-defaults": ("Gemma3ForCausalLM", _GEMMA3_DEFAULTS),
    "gemma3-vision": ("Gemma3ForConditionalGeneration", _GEMMA3),
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-bias": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-mha": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "llama-mqa": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "llama-head-dim": ("LlamaForCausalLM", {"head_dim": 24}),
    "llama-llama3-rope": ("LlamaForCausalLM", {"rope_parameters": _LLAMA3_ROPE}),
    "llama-linear-rope": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": 8}),
    "mistral-layer-types": (
        "MistralForCausalLM",
        {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2ForCausalLM", _WINDOW_FROM_LAYER_1),
    "qwen2-yarn": ("Qwen2ForCausalLM", {"rope_parameters": _YARN_ROPE}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "qwen3-bias": ("Qwen3ForCausalLM", {"attention_bias": True}),
    "qwen3-window": ("Qwen3ForCausalLM", _WINDOW_FROM_LAYER_1),
}
"""Name to architecture and config overrides: every family, and every option that changes its arithmetic."""


def write_variant(directory: Path, variant: str) -> Path:
    """A checkpoint of one of VARIANTS."""
    architecture, overrides = VARIANTS[variant]
    return write_tiny_checkpoint(directory, architecture, **overrides)


def write_tiny_checkpoint(
    directory: Path,
    architecture: str = "LlamaForCausalLM",
    *,
    seed: int = 0,
    shards: int = 1,
    format: Literal["safetensors", "bin"] = "safetensors",
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = False,
    **overrides: Any,
) -> Path:
    """Write a seeded checkpoint to `directory` (made if need be) and return it.

    Two layers, hidden 64, 4 heads of 16, 2 kv heads, vocabulary 512; `overrides` are fields of the
    architecture's transformers config (of the text part, if it has others). Weights are large enough that
    greedy tokens vary, norms are not one, biases not zero. tokenizer=True adds a byte-level BPE tokenizer of
    that vocabulary and a chat template.
    """
    import transformers

    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "bos_token_id": BOS_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_ID,
        "tie_word_embeddings": False,
    }
    config = _transformers_config(architecture, fields | overrides)
    config.architectures, config.dtype = [architecture], dtype
    model = getattr(transformers, architecture)(config)
    _fill(model, seed, norms_around=0.0 if architecture.startswith("Gemma") else 1.0)
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    transformers.GenerationConfig.from_model_config(config).save_pretrained(directory)
    weights = {_published(name): tensor.detach().to(dtype) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    _write_weights(directory, weights, shards, format)
    if tokenizer:
        _write_tokenizer(directory, config.get_text_config().vocab_size)
    return directory


def _transformers_config(architecture: str, fields: dict[str, Any]) -> Any:
    import transformers

    if architecture == "Gemma3ForConditionalGeneration":
        vision = transformers.SiglipVisionConfig(**_TINY_VISION)
        text = transformers.Gemma3TextConfig(**fields)
        return transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    name = {"Gemma3ForCausalLM": "Gemma3TextConfig"}.get(
        architecture, architecture.replace("ForCausalLM", "Config")
    )
    return getattr(transformers, name)(**fields)


def _published(name: str) -> str:
    """What checkpoints on the hub call a tensor that transformers 5 calls `name`."""
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.")
    return name.removeprefix("model.") if name.startswith(_VISION_MODULES) else name


def _fill(model: torch.nn.Module, seed: int, norms_around: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1 or name.startswith(_VISION_MODULES):
                parameter.copy_(0.3 * noise + (0.0 if name.endswith("bias") else norms_around))
            else:
                parameter.copy_(noise * (0.5 if "embed" in name else 2.0 * parameter.shape[1] ** -0.5))


def _write_weights(directory: Path, weights: dict[str, torch.Tensor], shards: int, format: str) -> None:
    from safetensors.torch import save_file

    stem, suffix = ("model", "safetensors") if format == "safetensors" else ("pytorch_model", "bin")
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{shard + 1:05}-of-{shards:05}.{suffix}"
        part = {name: weights[name].clone() for name in names[shard::shards]}
        weight_map |= dict.fromkeys(part, file)
        if format == "safetensors":
            save_file(part, directory / file, metadata={"format": "pt"})
        else:
            torch.save(part, directory / file)
    if shards > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


CORPUS = (
    "The quick brown fox jumps over the lazy dog while the small moon turns around the blue planet.",
    "Neptune has a moon that is called Halimede, and another that is called Triton; both are cold and far.",
    "A scheduler decides which requests run next, and a cache keeps what was computed for the next request.",
    "Every token reads the tokens before it, so the keys and the values of old tokens are kept in blocks.",
    "Once upon a time there was a little machine that could answer questions about the weather and the sea.",
    "What is the capital of France? The capital of France is Paris, a city on the river Seine.",
    "Write a short story about a cat, a garden and a glass of water. Count from one to ten, then stop.",
    "def add(first, second): return first + second  # numbers such as 0, 1, 2, 42 and 1984 are tokens too",
    "Größe, été, mañana, снег, 雪, 🙂: text is more than the letters of one alphabet.",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def _write_tokenizer(directory: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    assert tokenizer.get_vocab_size() == vocab_size, f"the corpus gives {tokenizer.get_vocab_size()} tokens"
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS_TOKEN_ID)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def transformers_model(path: Path) -> Any:
    """transformers' model of a checkpoint: float32, evaluation mode, plain attention."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def reference_logits(path: Path, token_ids: Sequence[int]) -> torch.Tensor:
    """transformers' logits of every position, (S, V) float32."""
    with torch.inference_mode():
        logits: torch.Tensor = transformers_model(path)(torch.tensor([list(token_ids)])).logits[0]
    return logits


def greedy_reference(path: Path, prompt_token_ids: Sequence[int], n: int) -> list[int]:
    """The n tokens that transformers generates greedily, end-of-sequence tokens not stopping it."""
    model, token_ids = transformers_model(path), list(prompt_token_ids)
    with torch.inference_mode():
        for _ in range(n):
            token_ids.append(int(model(torch.tensor([token_ids])).logits[0, -1].argmax()))
    return token_ids[len(prompt_token_ids) :]


def read_config(path: Path) -> ModelConfig:
    """Our config of a checkpoint directory."""
    file = path / "config.json"
    return ModelConfig.from_hf(json.loads(file.read_text()), str(file))


def load_model(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backend: Backend | None = None,
) -> CausalLM:
    """Our model of a safetensors checkpoint directory, ready to run."""
    config = read_config(path)
    model = build_model(config)
    files = ModelFiles(str(path), "safetensors", tuple(sorted(path.glob("*.safetensors"))), {}, str(path))
    with open_weights(files) as source:
        load_weights(
            model,
            source,
            device=torch.device(device),
            dtype=dtype,
            progress=False,
            quantization=config.quantization,
        )
    model.prepare(torch.device(device), dtype, config.max_position_embeddings, backend=backend)
    return model


def make_kv_caches(model: CausalLM, num_blocks: int, block_size: int, fill: float = 0.0) -> list[KVCache]:
    """One cache per layer, in the model's dtype and device; fill=nan shows reads of unwritten slots."""
    config, embedding = model.config, model.model.embed_tokens
    weight = embedding.form or embedding.weight
    shape = (num_blocks, config.num_key_value_heads, block_size, config.head_dim)

    def full() -> torch.Tensor:
        return torch.full(shape, fill, dtype=weight.dtype, device=weight.device)

    return [KVCache(full(), full()) for _ in range(config.num_hidden_layers)]


@dataclass(frozen=True)
class RowInput:
    """One sequence's share of a step: token_ids to run after num_computed tokens that are in block_table."""

    token_ids: Sequence[int]
    num_computed: int
    block_table: Sequence[int]


def make_model_input(rows: Sequence[RowInput], block_size: int, device: str = "cpu") -> ModelInput:
    """The step that runs these rows, with the logits of every token wanted."""
    ids = [token for row in rows for token in row.token_ids]
    positions = [row.num_computed + i for row in rows for i in range(len(row.token_ids))]
    owners = [row for row in rows for _ in row.token_ids]
    slots = [
        row.block_table[p // block_size] * block_size + p % block_size
        for row, p in zip(owners, positions, strict=True)
    ]
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + len(row.token_ids))
    lengths = [row.num_computed + len(row.token_ids) for row in rows]
    width = max((len(row.block_table) for row in rows), default=0)
    tables = [list(row.block_table) + [0] * (width - len(row.block_table)) for row in rows]

    def tensor(values: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    attn = AttentionMetadata(
        slot_mapping=tensor(slots, torch.int64),
        block_tables=tensor(tables, torch.int32).view(len(rows), width),
        query_start_loc=tensor(starts, torch.int32),
        seq_lens=tensor(lengths, torch.int32),
        max_query_len=max((len(row.token_ids) for row in rows), default=0),
        max_seq_len=max(lengths, default=0),
        num_decode_rows=sum(len(row.token_ids) == 1 for row in rows),
    )
    return ModelInput(
        tensor(ids, torch.int64), tensor(positions, torch.int64), tensor(range(len(ids)), torch.int64), attn
    )


def run_model(
    model: CausalLM, token_ids: Sequence[int], *, chunk_size: int | None = None, block_size: int = 16
) -> torch.Tensor:
    """Our logits (S, V) of one sequence run in chunks (default: all at once) with a fresh KV cache.

    Its blocks are scattered over a cache that holds NaN where nothing was written.
    """
    chunk_size = chunk_size or len(token_ids)
    num_blocks = -(-len(token_ids) // block_size)
    block_table = [1 + (7 * i + 3) % 11 + i // 11 * 11 for i in range(num_blocks)]
    device = str(model.model.rotary_emb.tables[0].device)
    kv_caches = make_kv_caches(model, max(block_table, default=0) + 1, block_size, float("nan"))
    logits = []
    with torch.inference_mode():
        for start in range(0, len(token_ids), chunk_size):
            row = RowInput(token_ids[start : start + chunk_size], start, block_table)
            hidden_states = model(make_model_input([row], block_size, device), kv_caches)
            logits.append(model.compute_logits(hidden_states))
    return torch.cat(logits)
