"""Mistral 7B and its successors with the same architecture."""

from halimede.engine.config_fields import ConfigFields
from halimede.engine.models.base import CausalLM
from halimede.engine.models.config import ArchitectureOptions
from halimede.engine.models.window_fields import windows_by_type

_DEFAULT_SLIDING_WINDOW = 4096


class MistralForCausalLM(CausalLM):
    """The shared decoder without biases; one sliding window for every layer, or none."""

    @classmethod
    def read_options(cls, fields: ConfigFields) -> ArchitectureOptions:
        """The window: null is none, but a config without the field means 4096, as in transformers.

        `layer_types`, which few have, says which layers it is for.
        """
        window = fields.optional_integer("sliding_window")
        if "sliding_window" not in fields.names():
            window = _DEFAULT_SLIDING_WINDOW
        if fields.texts("layer_types"):
            return ArchitectureOptions(sliding_windows=windows_by_type(fields, window))
        return ArchitectureOptions(sliding_windows=(window,) * fields.integer("num_hidden_layers"))
