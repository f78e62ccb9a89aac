"""AWQ checkpoints (AutoAWQ, version "gemm"): 4-bit codes in groups of columns, with a zero for each group.

Tensors of a module, G = K / group_size: qweight int32 [K, N / 8], qzeros int32 [G, N / 8], scales float16
[G, N]; W[n, k] = (code[k, n] - zero[g, n]) * scale[g, n]. A word holds eight neighbouring columns, in the
order 0, 2, 4, 6, 1, 3, 5, 7 from its low bits up.

Source of the layout: AutoAWQ, awq/utils/packing_utils.py and awq/modules/linear/gemm.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from halimede.engine.config_fields import ConfigFields
from halimede.engine.quant.canonical import GroupedWeight
from halimede.engine.quant.module_names import is_listed
from halimede.engine.quant.packing import unpack_words
from halimede.engine.quant.scheme import ModuleKind
from halimede.engine.quant.stored import StoredModule
from halimede.errors import UnsupportedQuantizationError

_BITS = 4
_PER_WORD = 32 // _BITS
_SYMMETRIC_ZERO = 8
# Where column i of eight lies among a word's codes.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, slots=True)
class AwqFormat:
    """group_size: -1 is all columns. has_zeros: qzeros are there; else every zero is 8."""

    group_size: int
    has_zeros: bool

    @property
    def required(self) -> Sequence[str]:
        """See WeightFormat."""
        return ("qweight", "qzeros", "scales") if self.has_zeros else ("qweight", "scales")

    @property
    def optional(self) -> Sequence[str]:
        """See WeightFormat."""
        return () if self.has_zeros else ("qzeros",)

    def check(self, stored: StoredModule) -> None:
        """See WeightFormat."""
        self._tensors(stored)

    def convert(self, stored: StoredModule) -> GroupedWeight:
        """See WeightFormat."""
        qweight, qzeros, scales = self._tensors(stored)
        return GroupedWeight(
            codes=_unpack(qweight).t().contiguous(),
            bits=_BITS,
            group_size=stored.in_features // scales.shape[0],
            scales=scales.t().contiguous(),
            zero=_SYMMETRIC_ZERO if qzeros is None else _unpack(qzeros).t().contiguous(),
        )

    def _tensors(self, stored: StoredModule) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        rows, columns = stored.out_features, stored.in_features
        groups = stored.whole_groups(columns if self.group_size == -1 else self.group_size)
        if rows % _PER_WORD:
            raise stored.error(
                "qweight", f"cannot hold {rows} outputs, which are not a multiple of {_PER_WORD}"
            )
        words = rows // _PER_WORD
        qweight = stored.get("qweight", [(columns, words)], [torch.int32])
        qzeros = stored.get("qzeros", [(groups, words)], [torch.int32]) if self.has_zeros else None
        return qweight, qzeros, stored.scales("scales", [(groups, rows)])


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, N / 8] to uint8 [R, N]."""
    codes = unpack_words(words, _BITS, dim=1).view(words.shape[0], -1, _PER_WORD)
    return codes[..., list(_PLACES)].reshape(words.shape[0], -1)


@dataclass(frozen=True, slots=True)
class AwqScheme:
    """All linear modules but those of `excluded`, and lm_head where `lm_head` says so."""

    format: AwqFormat
    excluded: tuple[str, ...]
    lm_head: bool
    method: str = "awq"
    kv_cache_scales: bool = False

    def format_of(self, name: str, kind: ModuleKind) -> AwqFormat | None:
        """See QuantScheme."""
        if kind != "Linear" or (name == "lm_head" and not self.lm_head) or is_listed(name, self.excluded):
            return None
        return self.format


def read(fields: ConfigFields) -> AwqScheme:
    """The settings of a quantization_config. Raises as registry.read_scheme."""
    bits = fields.integer("bits") if fields.has("bits") else fields.integer("w_bit")
    if bits != _BITS:
        raise UnsupportedQuantizationError(
            f"{fields.source}: AWQ with {bits} bits is not supported; it has 4, take such a checkpoint"
        )
    version = fields.text("version", "gemm").lower()
    if version != "gemm":
        raise UnsupportedQuantizationError(
            f"{fields.source}: AWQ of version {version!r} is not supported; take one of version 'gemm'"
        )
    name = "group_size" if fields.has("group_size") else "q_group_size"
    return AwqScheme(
        AwqFormat(fields.integer(name, minimum=-1), fields.flag("zero_point", True)),
        fields.texts("modules_to_not_convert"),
        fields.flag("lm_head", False),
    )
