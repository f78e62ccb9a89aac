"""Llama 1 to 3.x, and the many models that share its architecture (SmolLM, TinyLlama, Yi, ...)."""

from halimede.engine.config_fields import ConfigFields
from halimede.engine.models.base import CausalLM
from halimede.engine.models.config import ArchitectureOptions


class LlamaForCausalLM(CausalLM):
    """The shared decoder; attention_bias covers all four projections of attention.

    A config made from a GGUF, which lists its tensors, says of o_proj apart: attention_output_bias.
    """

    @classmethod
    def read_options(cls, fields: ConfigFields) -> ArchitectureOptions:
        """Biases, which few Llamas have."""
        bias = fields.flag("attention_bias", False)
        return ArchitectureOptions(
            attention_bias=bias,
            attention_output_bias=fields.flag("attention_output_bias", bias),
            mlp_bias=fields.flag("mlp_bias", False),
        )
