"""Qwen2 and Qwen2.5."""

from halimede.engine.models.base import CausalLM
from halimede.engine.models.config import ArchitectureOptions
from halimede.engine.models.config_fields import ConfigFields
from halimede.errors import ModelLoadError, UnsupportedModelError


class Qwen2ForCausalLM(CausalLM):
    """The shared decoder with biases on q, k and v."""

    @classmethod
    def read_options(cls, fields: ConfigFields) -> ArchitectureOptions:
        """The layers with a sliding window; the biases are always there."""
        return ArchitectureOptions(attention_bias=True, sliding_windows=read_layer_windows(fields))


def read_layer_windows(fields: ConfigFields) -> tuple[int | None, ...]:
    """Window of each layer: `layer_types` says which have one, or else those from max_window_layers on.

    Raises ModelLoadError when the fields contradict each other, UnsupportedModelError for a layer type that
    is neither full_attention nor sliding_attention.
    """
    num_layers = fields.integer("num_hidden_layers")
    window = fields.optional_integer("sliding_window") if fields.flag("use_sliding_window", False) else None
    types = fields.texts("layer_types")
    if not types:
        first = num_layers if window is None else fields.integer("max_window_layers", minimum=0)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedModelError(
            f"{fields.source}: layer types {', '.join(unknown)} are not supported; "
            "supported: full_attention, sliding_attention"
        )
    if len(types) != num_layers:
        raise fields.wrong("layer_types", list(types), f"one type for each of the {num_layers} layers")
    if window is None and "sliding_attention" in types:
        raise ModelLoadError(
            f"{fields.source}: layer_types has sliding_attention, but use_sliding_window is false or "
            "sliding_window is null; correct the config"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)
