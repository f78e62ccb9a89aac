"""Which layers have a sliding window, as the families write it in config.json."""

from halimede.engine.config_fields import ConfigFields
from halimede.errors import ModelLoadError, UnsupportedModelError


def read_layer_windows(fields: ConfigFields) -> tuple[int | None, ...]:
    """Qwen's way: `layer_types` says which layers have one, or else those from max_window_layers on.

    Raises what windows_by_type raises.
    """
    num_layers = fields.integer("num_hidden_layers")
    window = fields.optional_integer("sliding_window") if fields.flag("use_sliding_window", False) else None
    if fields.texts("layer_types"):
        return windows_by_type(fields, window)
    first = num_layers if window is None else fields.integer("max_window_layers", minimum=0)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def windows_by_type(fields: ConfigFields, window: int | None) -> tuple[int | None, ...]:
    """`window` for each layer whose type in `layer_types` is sliding_attention.

    Raises ModelLoadError when the fields contradict each other, UnsupportedModelError for a layer type that
    is neither full_attention nor sliding_attention.
    """
    types, num_layers = fields.texts("layer_types"), fields.integer("num_hidden_layers")
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
