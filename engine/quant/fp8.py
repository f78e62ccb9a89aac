"""FP8 checkpoints: float8_e4m3fn weights with scales for tensors, rows or blocks; "fp8" and "fbgemm_fp8".

Tensors of a module: weight float8_e4m3fn [N, K] and one of
    weight_scale_inv [ceil(N / bn), ceil(K / bk)]   with weight_block_size [bn, bk] (DeepSeek-V3, Qwen3-FP8)
    weight_scale or weight_scale_inv () or (1)      for the whole tensor
    weight_scale [N, 1] or [N]                      for rows (FBGEMM)
W[n, k] = weight[n, k] * scale, also where it is called an inverse. input_scale or activation_scale () is the
scale of calibrated activations. Scales are floating, or powers of two as float8_e8m0fnu or its bytes.

Source of the layouts: transformers, integrations/finegrained_fp8.py and integrations/fbgemm_fp8.py; vLLM,
model_executor/layers/quantization/fp8.py, for the names of the per-tensor ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from halimede.engine.config_fields import ConfigFields
from halimede.engine.quant.canonical import Fp8Weight
from halimede.engine.quant.module_names import is_listed
from halimede.engine.quant.scheme import ModuleKind
from halimede.engine.quant.stored import StoredModule
from halimede.errors import UnsupportedQuantizationError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_POWERS = (torch.float8_e8m0fnu, torch.uint8)
_FMTS = ("e4m3", "float8_e4m3fn")


@dataclass(frozen=True, slots=True)
class Fp8Format:
    """How an FP8 weight is stored; other methods have it too, with names of their own.

    block: rows and columns that share a scale; None where the tensor or each row has one. scale_names,
    input_names: the tensor of scales, and of the activations' scale, goes by one of these; no input_names
    where each token has its own. unread: suffixes of tensors that may be there and change nothing.
    """

    block: tuple[int, int] | None = None
    scale_names: tuple[str, ...] = ("weight_scale",)
    input_names: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def required(self) -> Sequence[str]:
        """See WeightFormat."""
        alone = [names[0] for names in (self.scale_names, self.input_names) if len(names) == 1]
        return ("weight", *alone)

    @property
    def optional(self) -> Sequence[str]:
        """See WeightFormat."""
        either = [name for names in (self.scale_names, self.input_names) if len(names) > 1 for name in names]
        return (*either, *self.unread)

    def check(self, stored: StoredModule) -> None:
        """See WeightFormat."""
        self._tensors(stored)

    def convert(self, stored: StoredModule) -> Fp8Weight:
        """See WeightFormat. A scale of the whole tensor becomes one of each row, as fused modules need it."""
        weight, scales, static_scale = self._tensors(stored)
        bad = int((weight.view(torch.uint8) & 0x7F == 0x7F).sum())
        if bad:
            raise stored.error("weight", f"has {bad} codes that are NaN")
        block = self.block
        if block is None:
            block = (1, stored.in_features)
            scales = scales.reshape(-1, 1).expand(stored.out_features, 1).contiguous()
        return Fp8Weight(weight, scales, block, static_scale)

    def _tensors(self, stored: StoredModule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        rows, columns = stored.out_features, stored.in_features
        weight = stored.get("weight", [(rows, columns)], [torch.float8_e4m3fn])
        shapes: list[tuple[int, ...]] = [(), (1,), (rows, 1), (rows,)]
        if self.block is not None:
            shapes = [(-(-rows // self.block[0]), -(-columns // self.block[1]))]
        scales = _scales(stored, _one_of(stored, self.scale_names), shapes)
        if not self.input_names:
            return weight, scales, None
        static_scale = _scales(stored, _one_of(stored, self.input_names), [(), (1,)])
        return weight, scales, static_scale.reshape(1)


def _one_of(stored: StoredModule, suffixes: Sequence[str]) -> str:
    found = [suffix for suffix in suffixes if suffix in stored]
    if len(suffixes) > 1 and len(found) != 1:
        has = "both" if found else "neither"
        raise stored.error("weight", f"has {has} of {' and '.join(suffixes)} beside it, and needs one")
    return found[0] if found else suffixes[0]


def _scales(stored: StoredModule, suffix: str, shapes: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Scales in float32, checked to be finite."""
    tensor = stored.get(suffix, shapes, (*_FLOATS, *_POWERS))
    if tensor.dtype == torch.uint8:
        tensor = tensor.view(torch.float8_e8m0fnu)
    scales = tensor.float()
    bad = int((~torch.isfinite(scales)).sum())
    if bad:
        raise stored.error(suffix, f"has {bad} scales that are NaN or infinite")
    return scales


@dataclass(frozen=True, slots=True)
class Fp8Scheme:
    """All linear modules but lm_head and those of `excluded`."""

    format: Fp8Format
    excluded: tuple[str, ...]
    method: str = "fp8"
    kv_cache_scales: bool = True

    def format_of(self, name: str, kind: ModuleKind) -> Fp8Format | None:
        """See QuantScheme."""
        if kind != "Linear" or name == "lm_head" or is_listed(name, self.excluded):
            return None
        return self.format


def read(fields: ConfigFields) -> Fp8Scheme:
    """The settings of a quantization_config. Raises as registry.read_scheme."""
    excluded = (*fields.texts("modules_to_not_convert"), *fields.texts("ignored_layers"))
    if fields.text("quant_method") == "fbgemm_fp8":
        return Fp8Scheme(Fp8Format(unread=("input_scale_ub",)), excluded)
    fmt = fields.text("fmt", _FMTS[0])
    if fmt not in _FMTS:
        raise UnsupportedQuantizationError(
            f"{fields.source}: FP8 with fmt={fmt!r} is not supported; take a checkpoint in 'e4m3'"
        )
    activations = fields.text("activation_scheme", "dynamic").lower()
    if activations not in ("dynamic", "static"):
        raise UnsupportedQuantizationError(
            f"{fields.source}: FP8 with activation_scheme={activations!r} is not supported; take a "
            "checkpoint whose scheme is 'dynamic' or 'static'"
        )
    block = fields.numbers("weight_block_size")
    if block and (len(block) != 2 or any(size != int(size) for size in block)):
        raise fields.wrong("weight_block_size", list(block), "the rows and columns of a block")
    return Fp8Scheme(
        Fp8Format(
            block=(int(block[0]), int(block[1])) if block else None,
            scale_names=("weight_scale_inv",) if block else ("weight_scale", "weight_scale_inv"),
            input_names=("input_scale", "activation_scale") if activations == "static" else (),
        ),
        excluded,
    )
