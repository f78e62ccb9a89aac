"""Which quantization methods there are, by the name that a checkpoint's quantization_config gives.

To add one: write one file beside this with `read(fields) -> QuantScheme` (see scheme.py), and add one line to
METHODS; the README's table is made of them. docs/quantization.md goes through an example.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

from halimede.engine.config_fields import ConfigFields
from halimede.errors import UnsupportedQuantizationError

if TYPE_CHECKING:  # what is supported can be listed without torch
    from halimede.engine.quant.scheme import QuantScheme


@dataclass(frozen=True, slots=True)
class Method:
    """One quantization method.

    module: of this package, with its `read`. title, weights: for people, what it is called and which of its
    variants are read. form: the canonical form that its weights take. aliases: other names it goes by.
    """

    module: str
    title: str
    weights: str
    form: str
    aliases: tuple[str, ...] = ()


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "awq": Method("awq", "AWQ", "4 bits, gemm, any zero point", "WNA16", ("awq_marlin",)),
        "gptq": Method("gptq", "GPTQ", "2, 3, 4, 8 bits, any zero, act-order", "WNA16", ("gptq_marlin",)),
        "bitsandbytes": Method("bitsandbytes", "bitsandbytes", "NF4, FP4, double quant; int8", "WNA16"),
        "mxfp4": Method("mxfp4", "MXFP4", "4-bit floats in groups of 32", "WNA16"),
        "gguf": Method("gguf", "GGUF", "Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0", "WNA16"),
        "compressed-tensors": Method(
            "compressed_tensors",
            "compressed-tensors",
            "2 to 8 bits with any activation order, INT8 with 8-bit activations, FP8, MXFP4, MXFP8, mixtures",
            "WNA16, W8A8, FP8",
        ),
        "fp8": Method("fp8", "FP8", "e4m3 with scales for tensors, rows or blocks", "FP8", ("fbgemm_fp8",)),
        "modelopt": Method(
            "modelopt", "ModelOpt", "FP8, FP8_PER_CHANNEL_PER_TOKEN", "FP8", ("modelopt_fp4",)
        ),
    }
)
_BY_NAME = {name: name for name in METHODS} | {
    alias: name for name, method in METHODS.items() for alias in method.aliases
}
_SECTIONS = ("quantization_config", "compression_config")


def method_name(name: str) -> str | None:
    """The registry's name of a method; None where it is not known."""
    return _BY_NAME.get(name.lower().replace("_", "-"), _BY_NAME.get(name.lower().replace("-", "_")))


def read_scheme(config: ConfigFields) -> "QuantScheme | None":
    """How a checkpoint's weights are quantized; None where they are not.

    config: of its config.json. Raises UnsupportedQuantizationError for a method or a variant of one that is
    not supported, ModelLoadError for settings that are missing or wrong.
    """
    for section in _SECTIONS:
        fields = config.section(section)
        if fields is not None:
            given = fields.text("quant_method", "compressed-tensors" if section == _SECTIONS[1] else "")
            name = method_name(given)
            if name is None:
                raise UnsupportedQuantizationError(
                    f"{fields.source}: the checkpoint is quantized with {given or 'no quant_method'!r}, "
                    f"which is not supported; supported: {', '.join(METHODS)}, or one that is not quantized"
                )
            module = import_module(f"halimede.engine.quant.{METHODS[name].module}")
            scheme: QuantScheme = module.read(fields)
            return scheme
    return None
