"""What Hugging Face calls the tensors of a GGUF."""

from pathlib import Path

from halimede.errors import UnsupportedModelError

_OUTSIDE_LAYERS = ("model.embed_tokens", "model.norm", "lm_head")
_IN_LAYER = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *(f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")),
)


def hf_names(arch: str, num_layers: int, path: Path) -> dict[str, str]:
    """GGUF tensor name -> Hugging Face name, through the map that GGUF files are made with."""
    from gguf import get_tensor_name_map
    from gguf.constants import MODEL_ARCH_NAMES

    known = {name: key for key, name in MODEL_ARCH_NAMES.items()}
    if arch not in known:
        raise UnsupportedModelError(f"{path}: architecture {arch!r} is not supported in GGUF")
    to_gguf = get_tensor_name_map(known[arch], num_layers)
    modules = [
        *_OUTSIDE_LAYERS,
        *(f"model.layers.{i}.{part}" for i in range(num_layers) for part in _IN_LAYER),
    ]
    names = {}
    for module in modules:
        gguf_name = to_gguf.get_name(module)
        if gguf_name is not None:
            for kind in ("weight", "bias"):
                names[f"{gguf_name}.{kind}"] = f"{module}.{kind}"
    return names
