"""Qwen2 and Qwen2.5."""

from halimede.engine.config_fields import ConfigFields
from halimede.engine.models.base import CausalLM
from halimede.engine.models.config import ArchitectureOptions
from halimede.engine.models.window_fields import read_layer_windows


class Qwen2ForCausalLM(CausalLM):
    """The shared decoder with biases on q, k and v."""

    @classmethod
    def read_options(cls, fields: ConfigFields) -> ArchitectureOptions:
        """The layers with a sliding window; the biases are always there."""
        return ArchitectureOptions(attention_bias=True, sliding_windows=read_layer_windows(fields))
