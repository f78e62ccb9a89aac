"""NVIDIA ModelOpt checkpoints, quant_algo FP8 and FP8_PER_CHANNEL_PER_TOKEN.

Tensors of a module: weight float8_e4m3fn [N, K], weight_scale () and input_scale (), or weight_scale [N]
where each row has one and each token its own; W[n, k] = weight[n, k] * weight_scale. The settings are the
quantization_config of config.json or, before that, hf_quant_config.json (loader/quant_config_files.py).

Source of the layout: ModelOpt, torch/export/quant_utils.py, and vLLM,
model_executor/layers/quantization/modelopt.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from halimede.engine.config_fields import ConfigFields
from halimede.engine.quant.fp8 import Fp8Format
from halimede.engine.quant.module_names import is_listed
from halimede.engine.quant.scheme import ModuleKind
from halimede.errors import UnsupportedQuantizationError

_ALGORITHMS: Mapping[str, Fp8Format] = MappingProxyType(
    {
        "FP8": Fp8Format(input_names=("input_scale",)),
        "FP8_PER_CHANNEL_PER_TOKEN": Fp8Format(),
    }
)


@dataclass(frozen=True, slots=True)
class ModelOptScheme:
    """All linear modules but those of `excluded`, in which * stands for anything."""

    format: Fp8Format
    excluded: tuple[str, ...]
    kv_cache_scales: bool
    method: str = "modelopt"

    def format_of(self, name: str, kind: ModuleKind) -> Fp8Format | None:
        """See QuantScheme."""
        if kind != "Linear" or is_listed(name, self.excluded):
            return None
        return self.format


def read(fields: ConfigFields) -> ModelOptScheme:
    """The settings of a quantization_config. Raises as registry.read_scheme."""
    fields = fields.section("quantization") or fields
    algorithm = fields.text("quant_algo").upper()
    if algorithm not in _ALGORITHMS:
        raise UnsupportedQuantizationError(
            f"{fields.source}: ModelOpt's quant_algo={algorithm!r} is not supported; supported: "
            f"{', '.join(_ALGORITHMS)}"
        )
    excluded = (*fields.texts("exclude_modules"), *fields.texts("ignore"))
    return ModelOptScheme(
        _ALGORITHMS[algorithm],
        excluded or ("lm_head",),  # which ModelOpt leaves alone; its first versions had no list
        kv_cache_scales=fields.has("kv_cache_quant_algo") or fields.has("kv_cache_scheme"),
    )
