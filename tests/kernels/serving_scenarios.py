"""Whole serving runs in which no kernel runs: scheduler, runner, model and sampler are the real ones,
launches are handed to somebody, and only what the host must read back is made up.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from halimede import LLM, SamplingParams
from halimede.engine.executor import settings as settings_module
from halimede.engine.layers import mlp
from halimede.engine.layers.linear import Linear
from halimede.engine.loader import dummy
from halimede.engine.loader.host_memory import WeightMemory
from halimede.engine.quant.forms.base import Activations, Placement, QuantizedActivations
from halimede.kernels.launch import Launch, intercepting
from halimede.kernels.target import Target

VOCAB_SIZE = 512
LONGEST = 700
META = torch.device("meta")
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": LONGEST,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen3": {**_LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "mistral": {
        **_LLAMA,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 64,
    },
    "gemma3": {
        **_LLAMA,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_act": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 32,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_local_base_freq": 10000.0,
    },
}
BATCHES = (1, 2, 15, 16, 17, 255, 256)
_SAMPLED = (
    {"temperature": 0.8},
    {"temperature": 0.8, "top_k": 5},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.8, "min_p": 0.1},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 0.8, "n": 3},
)
_GREEDY = (
    {},
    {"repetition_penalty": 1.1},
    {"frequency_penalty": 0.5},
    {"presence_penalty": 0.5},
    {"logit_bias": {3: 2.0}},
    {"allowed_token_ids": [1, 2, 3]},
    {"min_tokens": 2, "stop_token_ids": [5]},
    {"logprobs": 0},
    {"logprobs": 1},
    {"logprobs": 20},
    {"prompt_logprobs": 0},
    {"prompt_logprobs": 5},
)


def write_model(folder: Path, name: str, **changes: Any) -> Path:
    """A directory with nothing but the config.json of a tiny model."""
    (folder / "config.json").write_text(json.dumps({**MODELS[name], **changes}))
    return folder


@contextlib.contextmanager
def nothing_computed(target: Target, on_launch: Callable[[Launch], None]) -> Iterator[None]:
    """Launches are for `target` and go to `on_launch`; matrix products and sampled tokens are made up.

    Quantized weights are laid out as on the target, and their products launch what they do there.
    """
    generator = torch.Generator().manual_seed(0)

    def intercept(launch: Launch) -> None:
        on_launch(launch)
        given = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
        if launch.kernel.__name__ == "_draw_kernel":
            given["tokens_ptr"].random_(0, VOCAB_SIZE, generator=generator)
        elif launch.kernel.__name__ == "_logprobs_kernel":
            given["out_ptr"].zero_()

    def product(self: Linear, x: Activations) -> torch.Tensor:
        size = self.out_features
        if self.form is not None:
            size = self.form(_on_meta(x)).shape[1]
        if isinstance(x, QuantizedActivations):
            return torch.zeros(x.codes.shape[0], size, dtype=x.dtype)
        return x.new_zeros(x.shape[0], size)

    def prepare(self: Linear, *args: Any, **options: Any) -> None:
        if self.form is not None:
            before[1](self, *args, **options)

    def put_form(model: Any, module: Any, weights: Any, to: Placement, memory: Any) -> None:
        put_form_before(model, module, weights, Placement(META, to.dtype), WeightMemory(META))

    before = Linear.forward, Linear.prepare, settings_module.resolve_activation_dtype
    put_form_before, dummy.put_form = dummy.put_form, put_form  # type: ignore[attr-defined]
    is_for_gated_matmul = mlp.is_for_gated_matmul
    mlp.is_for_gated_matmul = lambda weight: weight.dtype.itemsize == 2
    Linear.forward, Linear.prepare = product, prepare  # type: ignore
    settings_module.resolve_activation_dtype = lambda dtype, device: dtype  # as on a GPU
    try:
        with intercepting(target, intercept):
            yield
    finally:
        Linear.forward, Linear.prepare = before[:2]  # type: ignore[method-assign]
        settings_module.resolve_activation_dtype = before[2]
        mlp.is_for_gated_matmul = is_for_gated_matmul
        dummy.put_form = put_form_before  # type: ignore[attr-defined]


def _on_meta(x: Activations) -> Activations:
    if isinstance(x, QuantizedActivations):
        return QuantizedActivations(x.codes.to(META), x.scales.to(META), x.dtype)
    return x.to(META)


def open_llm(folder: Path, **settings: Any) -> LLM:
    """An engine of the model that write_model wrote, on the CPU, with the Triton backend."""
    return LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        device="cpu",
        attention_backend="triton",
        **{
            "max_num_seqs": 256,
            "max_num_batched_tokens": 512,
            "num_gpu_blocks_override": 2048,
            **settings,
        },
    )


def serve(llm: LLM, *, batches: tuple[int, ...] = BATCHES) -> None:
    """Every batch size with lengths from 1 to the longest, every sampling option alone and all together,
    prompts that are cached, in chunks, and preempted where the cache is small."""
    longest = llm.max_model_len - 4
    for batch in batches:
        _generate(llm, [1 + (97 * i) % (48 if batch > 17 else longest) for i in range(batch)], [{}])
    _generate(llm, [longest], [{}])
    _generate(llm, [longest], [{}])  # the same prompt: from the prefix cache
    _generate(llm, list(range(16, 36)), [{"max_tokens": 40}])
    options = [*_GREEDY, *_SAMPLED]
    for option in options:
        _generate(llm, [33], [option])
        _generate(llm, [33, 20], [option, {}])
    _generate(llm, [5 + i for i in range(len(options))], options)
    for draw in _SAMPLED[:3]:
        for change in _GREEDY[1:]:
            _generate(llm, [40], [{**change, **draw}])


def _generate(llm: LLM, lengths: list[int], options: list[dict[str, Any]]) -> None:
    """Prompts of those lengths; options are for as many of them, the last one for the rest."""
    prompts = [{"prompt_token_ids": [3 + (7 * i + n) % 500 for i in range(n)]} for n in lengths]
    given = [options[min(at, len(options) - 1)] for at in range(len(lengths))]
    params = [SamplingParams(**{"temperature": 0.0, "max_tokens": 3, **one}) for one in given]
    outputs = llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
    assert all(output.error is None for output in outputs)
