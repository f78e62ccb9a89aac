"""GPTQ checkpoints (AutoGPTQ, GPTQModel): codes of 2, 3, 4 or 8 bits in groups of columns, in any order.

Tensors of a module, G = K / group_size, b bits: qweight int32 [K b / 32, N], packed along K; qzeros int32
[G, N b / 32], packed along N; scales float16 [G, N]; g_idx int32 [K], the group of each column (act-order).
W[n, k] = (code[k, n] - zero[g, n]) * scale[g, n], g = g_idx[k].

Codes lie one after the other with the first in the low bits; of 3 bits 32 fill three words, and the 11th and
22nd lie across two. checkpoint_format "gptq" stores zeros one too low. A zero of 0 is then out of range:
GPTQModel subtracts one of all zeros of a word at once, which borrows from the next of them, and adding to the
word gives back what there was. Of 3 bits it subtracts from each by itself, and 0 becomes 7.

Source of the layout: AutoGPTQ, nn_modules/qlinear/qlinear_cuda.py; of zeros: GPTQModel, utils/model.py
(convert_gptq_v1_to_v2_format_module); of `dynamic`: GPTQModel, quantization/config.py (dynamic_get).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from halimede.engine.config_fields import ConfigFields
from halimede.engine.quant.canonical import GroupedWeight
from halimede.engine.quant.module_names import is_listed, spellings
from halimede.engine.quant.packing import unpack_dense, unpack_words
from halimede.engine.quant.scheme import ModuleKind
from halimede.engine.quant.stored import StoredModule
from halimede.errors import UnsupportedQuantizationError

_BITS = (2, 3, 4, 8)
_WORD = 32
_VERSIONS = {"gptq": 1, "gptq_v2": 0}  # what is to be added to stored zeros
_EXCLUDED = "-:"
_OVERRIDDEN = "+:"


@dataclass(frozen=True, slots=True)
class GptqFormat:
    """group_size: -1 is all columns. zero_shift: what stored zeros are too low by. act_order: g_idx is there.

    g_idx that is there without act_order counts too: most checkpoints have it.
    """

    bits: int
    group_size: int
    zero_shift: int
    act_order: bool

    @property
    def required(self) -> Sequence[str]:
        """See WeightFormat."""
        return ("qweight", "qzeros", "scales", "g_idx") if self.act_order else ("qweight", "qzeros", "scales")

    @property
    def optional(self) -> Sequence[str]:
        """See WeightFormat."""
        return () if self.act_order else ("g_idx",)

    def check(self, stored: StoredModule) -> None:
        """See WeightFormat."""
        _, _, scales = self._tensors(stored)
        self._permutation(stored, scales.shape[0])

    def convert(self, stored: StoredModule) -> GroupedWeight:
        """See WeightFormat."""
        qweight, qzeros, scales = self._tensors(stored)
        permutation = self._permutation(stored, scales.shape[0])
        codes = self._unpack_columns(qweight)
        zeros = self._zeros(qzeros)
        first = int(zeros[0, 0])
        return GroupedWeight(
            codes=codes.contiguous() if permutation is None else codes[:, permutation].contiguous(),
            bits=self.bits,
            group_size=stored.in_features // scales.shape[0],
            scales=scales.t().contiguous(),
            # One for all is what symmetric weights have, and what is multiplied fastest.
            zero=first if bool((zeros == first).all()) else zeros.t().contiguous(),
            permutation=permutation,
        )

    def _tensors(self, stored: StoredModule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows, columns = stored.out_features, stored.in_features
        groups = stored.whole_groups(columns if self.group_size == -1 else self.group_size)
        for suffix, size, kind in (("qweight", columns, "inputs"), ("qzeros", rows, "outputs")):
            if size * self.bits % _WORD and suffix in stored:
                raise stored.error(
                    suffix, f"cannot hold {size} {kind}, whose {self.bits} bits each do not fill words of 32"
                )
        qweight = stored.get("qweight", [(columns * self.bits // _WORD, rows)], [torch.int32])
        qzeros = stored.get("qzeros", [(groups, rows * self.bits // _WORD)], [torch.int32])
        return qweight, qzeros, stored.scales("scales", [(groups, rows)])

    def _unpack_columns(self, qweight: torch.Tensor) -> torch.Tensor:
        """int32 [K b / 32, N] to uint8 [N, K]."""
        if _WORD % self.bits == 0:
            return unpack_words(qweight, self.bits, dim=0).t()
        return unpack_dense(qweight.t(), self.bits, qweight.shape[0] * _WORD // self.bits)

    def _zeros(self, qzeros: torch.Tensor) -> torch.Tensor:
        """int32 [G, N b / 32] to uint8 [G, N]."""
        if _WORD % self.bits == 0:
            ones = sum(self.zero_shift << place for place in range(0, _WORD, self.bits))
            return unpack_words(qzeros + ones, self.bits, dim=1)
        zeros = unpack_dense(qzeros, self.bits, qzeros.shape[1] * _WORD // self.bits)
        return zeros + self.zero_shift & (1 << self.bits) - 1

    def _permutation(self, stored: StoredModule, groups: int) -> torch.Tensor | None:
        """Columns in the order of their groups, [K] int64; None where they are in it already."""
        if not self.act_order and "g_idx" not in stored:
            return None
        columns = stored.in_features
        group_of = stored.get("g_idx", [(columns,)], [torch.int32, torch.int64]).long()
        bad = int(((group_of < 0) | (group_of >= groups)).sum())
        if bad:
            raise stored.error("g_idx", f"has {bad} entries that are not one of the groups 0 to {groups - 1}")
        sizes = torch.bincount(group_of, minlength=groups)
        wrong = (sizes != columns // groups).nonzero().view(-1).tolist()
        if wrong:
            raise stored.error(
                "g_idx",
                f"puts {int(sizes[wrong[0]])} columns into group {wrong[0]}, not {columns // groups}, which "
                "every group has",
            )
        order = torch.argsort(group_of, stable=True)
        return None if torch.equal(order, torch.arange(columns)) else order


@dataclass(frozen=True, slots=True)
class Rule:
    """What `dynamic` says of modules whose names begin as the pattern: None is not quantized."""

    pattern: re.Pattern[str]
    format: GptqFormat | None


@dataclass(frozen=True, slots=True)
class GptqScheme:
    """The first rule that matches a linear module decides, `format` without one.

    listed: the modules that are quantized, all where it is empty. excluded: those that are not. lm_head:
    whether that is quantized, on which the lists have no say.
    """

    format: GptqFormat
    rules: tuple[Rule, ...]
    listed: tuple[str, ...]
    excluded: tuple[str, ...]
    lm_head: bool
    method: str = "gptq"
    kv_cache_scales: bool = False

    def format_of(self, name: str, kind: ModuleKind) -> GptqFormat | None:
        """See QuantScheme."""
        if kind != "Linear" or not self._is_quantized(name):
            return None
        for rule in self.rules:
            if any(rule.pattern.match(spelling) for spelling in spellings(name)):
                return rule.format
        return self.format

    def _is_quantized(self, name: str) -> bool:
        if name == "lm_head":
            return self.lm_head
        return (not self.listed or is_listed(name, self.listed)) and not is_listed(name, self.excluded)


def read(fields: ConfigFields) -> GptqScheme:
    """The settings of a quantization_config. Raises as registry.read_scheme."""
    version = fields.text("checkpoint_format", "gptq").lower()
    if fields.flag("is_marlin_format", False):
        version = "marlin"
    if version not in _VERSIONS:
        raise UnsupportedQuantizationError(
            f"{fields.source}: GPTQ with checkpoint_format {version!r} is not supported; take a checkpoint "
            f"with {' or '.join(map(repr, _VERSIONS))}"
        )
    packed = fields.text("pack_dtype", "int32").removeprefix("torch.")
    if packed != "int32":
        raise UnsupportedQuantizationError(
            f"{fields.source}: GPTQ codes packed into {packed} are not supported; take a checkpoint with "
            "pack_dtype 'int32'"
        )
    default = GptqFormat(
        _read_bits(fields, "bits" if fields.has("bits") else "w_bit"),
        fields.integer("group_size" if fields.has("group_size") else "q_group_size", minimum=-1),
        _VERSIONS[version],
        fields.flag("desc_act", False),
    )
    return GptqScheme(
        default,
        _read_rules(fields, default),
        fields.nested_texts("modules_in_block_to_quantize"),
        fields.texts("modules_to_not_convert"),
        fields.flag("lm_head", False),
    )


def _read_bits(fields: ConfigFields, name: str, default: int | None = None) -> int:
    bits = fields.integer(name, default)
    if bits not in _BITS:
        raise UnsupportedQuantizationError(
            f"{fields.source}: GPTQ with {bits} bits is not supported; take a checkpoint with one of "
            f"{', '.join(map(str, _BITS))}"
        )
    return bits


def _read_rules(fields: ConfigFields, default: GptqFormat) -> tuple[Rule, ...]:
    """Those of `dynamic`: a regular expression, with "-:" for what is not quantized, "+:" or nothing else."""
    section = fields.section("dynamic")
    if section is None:
        return ()
    # GPTQModel puts them so before it reads or writes them.
    names = sorted(section.names(), key=lambda name: not name.startswith(_EXCLUDED))
    return tuple(Rule(_compile(section, name), _override(section, name, default)) for name in names)


def _compile(section: ConfigFields, name: str) -> re.Pattern[str]:
    try:
        return re.compile(name.removeprefix(_EXCLUDED).removeprefix(_OVERRIDDEN))
    except re.error as error:
        raise section.wrong("the key", name, f"a regular expression ({error})") from error


def _override(section: ConfigFields, name: str, default: GptqFormat) -> GptqFormat | None:
    if name.startswith(_EXCLUDED):
        return None
    fields = section.section(name)
    if fields is None:
        return default
    return GptqFormat(
        _read_bits(fields, "bits", default.bits),
        fields.integer("group_size", default.group_size, minimum=-1),
        default.zero_shift,
        fields.flag("desc_act", default.act_order),
    )
