"""The scales that a checkpoint has for an 8-bit KV cache, under the names that its tools give them."""

import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import nn

from halimede.engine.layers.attention import SelfAttention
from halimede.errors import ModelLoadError

# compressed-tensors: k_scale; ModelOpt: k_proj.k_scale; AutoFP8: k_proj.output_scale or, for both, kv_scale.
_SCALE = re.compile(
    r"(?P<layer>.*\.self_attn)\.((qkv_proj|k_proj|v_proj|attn)\.)?"
    r"((?P<kind>[kv])_scale|(?P<both>kv_scale)|(?<=(?P<of>[kv])_proj\.)output_scale)"
)
# Of what is not quantized here: queries and the weights of the softmax.
_IGNORED = re.compile(
    r".*\.self_attn\.((q_proj|attn)\.)?(q_scale|q_proj\.output_scale|output_scale|prob_scale)"
)


def is_kv_scale(name: str) -> bool:
    """Whether a tensor of this name (as the model would call it) is such a scale."""
    return _SCALE.fullmatch(name) is not None or _IGNORED.fullmatch(name) is not None


def take_kv_scales(
    model: nn.Module,
    names: Mapping[str, str],
    read: Callable[[str], torch.Tensor],
    where: Callable[[str], str],
) -> None:
    """Give the attention of each layer the scales of its keys and values.

    names: the checkpoint's name of each scale by the model's. A scale of -1 was never set and is 1, as in
    vLLM. ModelLoadError for one that is not a single positive number.
    """
    attentions = {path: module for path, module in model.named_modules() if isinstance(module, SelfAttention)}
    for model_name, name in names.items():
        match = _SCALE.fullmatch(model_name)
        attention = None if match is None else attentions.get(match["layer"])
        if match is None or attention is None:
            continue
        value = _scale(read(name), name, where)
        kinds = "kv" if match["both"] else match["kind"] or match["of"]
        attention.k_scale = value if "k" in kinds else attention.k_scale
        attention.v_scale = value if "v" in kinds else attention.v_scale


def _scale(tensor: torch.Tensor, name: str, where: Callable[[str], str]) -> float:
    value = float(tensor) if tensor.numel() == 1 else math.nan
    if value == -1:
        return 1.0
    if not 0 < value < math.inf:
        raise ModelLoadError(
            f"{where(name)}: the tensor {name} must be one positive number, a scale of the KV cache; its "
            f"shape is {tuple(tensor.shape)}, its value {value}; download the checkpoint again"
        )
    return value
