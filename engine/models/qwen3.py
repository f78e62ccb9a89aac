"""Qwen3, dense models."""

from halimede.engine.config_fields import ConfigFields
from halimede.engine.models.base import CausalLM
from halimede.engine.models.config import ArchitectureOptions
from halimede.engine.models.window_fields import read_layer_windows


class Qwen3ForCausalLM(CausalLM):
    """The shared decoder with a norm over each head of q and k."""

    @classmethod
    def read_options(cls, fields: ConfigFields) -> ArchitectureOptions:
        """Biases (off in the published models) and the layers with a sliding window."""
        bias = fields.flag("attention_bias", False)
        return ArchitectureOptions(
            attention_bias=bias,
            attention_output_bias=bias,
            qk_norm=True,
            sliding_windows=read_layer_windows(fields),
        )
