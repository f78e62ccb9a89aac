"""MXFP4 checkpoints: e2m1 codes in groups of 32 columns, each with a power of two as its scale.

Tensors of a module: weight_blocks uint8 [N, K / 32, 16], two codes in a byte with the even column in the low
bits; weight_scales uint8 [N, K / 32], of which s stands for 2^(s - 127) and 255 for NaN. A code is 0, 0.5, 1,
1.5, 2, 3, 4 or 6, negative with its highest bit.

Source: OCP Microscaling Formats (MX) v1.0, and transformers' integrations/mxfp4.py for names and the order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from halimede.engine.config_fields import ConfigFields
from halimede.engine.quant.canonical import GroupedWeight
from halimede.engine.quant.module_names import is_listed
from halimede.engine.quant.scheme import ModuleKind
from halimede.engine.quant.stored import StoredModule

GROUP_SIZE = 32
_NAN = 255
_BITS = 5
_ZERO = 16
_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def mxfp4_weight(packed: torch.Tensor, exponents: torch.Tensor) -> GroupedWeight:
    """The weight of packed [N, K / 2] uint8 and exponents [N, K / 32] uint8, none of them 255.

    Twice a value is a whole number from -12 to 12, so W = (code - 16) * 2^(s - 128) exactly, with codes of 5
    bits: they run where a table would not, and a zero in the middle of the codes costs nothing there.
    """
    assert not bool((exponents == _NAN).any()), "read_exponents refuses NaN"
    codes = torch.tensor([_ZERO + value for value in _DOUBLED], dtype=torch.uint8)
    powers = torch.tensor([math.ldexp(1.0, exponent - 128) for exponent in range(_NAN)])
    return GroupedWeight(
        codes=torch.stack((codes[(packed & 15).int()], codes[(packed >> 4).int()]), -1).flatten(1),
        bits=_BITS,
        group_size=GROUP_SIZE,
        scales=powers[exponents.int()],
        zero=_ZERO,
    )


def read_exponents(stored: StoredModule, suffix: str) -> torch.Tensor:
    """The scale bytes [N, K / 32] of a module. ModelLoadError, naming tensor and file, where one is NaN."""
    groups = stored.whole_groups(GROUP_SIZE)
    exponents = stored.get(suffix, [(stored.out_features, groups)], [torch.uint8])
    bad = int((exponents == _NAN).sum())
    if bad:
        raise stored.error(suffix, f"has {bad} scales that are NaN (the byte {_NAN})")
    return exponents


@dataclass(frozen=True, slots=True)
class Mxfp4Format:
    """There is one variant of it."""

    required: Sequence[str] = ("weight_blocks", "weight_scales")
    optional: Sequence[str] = ()

    def check(self, stored: StoredModule) -> None:
        """See WeightFormat."""
        self._tensors(stored)

    def convert(self, stored: StoredModule) -> GroupedWeight:
        """See WeightFormat."""
        blocks, exponents = self._tensors(stored)
        return mxfp4_weight(blocks.flatten(1), exponents)

    def _tensors(self, stored: StoredModule) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (stored.out_features, stored.whole_groups(GROUP_SIZE), GROUP_SIZE // 2)
        blocks = stored.get("weight_blocks", [shape], [torch.uint8])
        return blocks, read_exponents(stored, "weight_scales")


@dataclass(frozen=True, slots=True)
class Mxfp4Scheme:
    """All linear modules but those of `excluded`."""

    format: Mxfp4Format
    excluded: tuple[str, ...]
    method: str = "mxfp4"
    kv_cache_scales: bool = False

    def format_of(self, name: str, kind: ModuleKind) -> Mxfp4Format | None:
        """See QuantScheme."""
        if kind != "Linear" or is_listed(name, self.excluded):
            return None
        return self.format


def read(fields: ConfigFields) -> Mxfp4Scheme:
    """The settings of a quantization_config. Raises as registry.read_scheme.

    Without a list of what is not quantized that is lm_head, as in transformers (quantizers/base.py).
    """
    name = "modules_to_not_convert"
    return Mxfp4Scheme(Mxfp4Format(), fields.texts(name) if fields.has(name) else ("lm_head",))
