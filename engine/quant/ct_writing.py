"""Weights that were quantized while they were read, as compressed-tensors stores them: ct_formats' reverse.

Source: compressed-tensors, compressors/pack_quantized/base.py and compressors/naive_quantized/base.py.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from halimede.engine.quant.canonical import Fp8Weight, GroupedWeight, Int8Weight
from halimede.engine.quant.online import Int4Online, OnlineFormat, OnlineScheme
from halimede.engine.quant.packing import pack_words

_FORMATS: Mapping[str, str] = MappingProxyType(
    {"int4": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}
)


def stored_tensors(weight: GroupedWeight | Int8Weight | Fp8Weight) -> dict[str, torch.Tensor]:
    """The tensors of a module by their suffix. Scales are bfloat16, which holds online.py's exactly."""
    if not isinstance(weight, GroupedWeight):
        return {"weight": weight.weight, "weight_scale": weight.scales.view(-1, 1).to(torch.bfloat16)}
    tensors = {
        "weight_packed": pack_words(weight.codes, weight.bits, 1),
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if isinstance(weight.zero, torch.Tensor):
        tensors["weight_zero_point"] = pack_words(weight.zero, weight.bits, 0)
    return tensors


def quantization_config(
    scheme: OnlineScheme, columns: Mapping[str, int], ignore: Sequence[str]
) -> dict[str, Any]:
    """The quantization_config of a checkpoint.

    columns: of each quantized module, by its name. ignore: what else stays plain, beside lm_head.
    """
    groups = {
        f"group_{i}": _group(scheme, targets, size)
        for i, (size, targets) in enumerate(_targets(scheme.format, columns).items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": _FORMATS[scheme.method],
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *ignore],
        "kv_cache_scheme": None,
    }


def _targets(format_: OnlineFormat, columns: Mapping[str, int]) -> dict[int | None, list[str]]:
    """Which modules have groups of each size, None for whole rows; all linear ones if it is one size."""
    sizes: dict[int | None, set[str]] = {}
    for name, count in columns.items():
        size = format_.group_of(count) if isinstance(format_, Int4Online) else None
        # A group that is a row, of whatever length, is a channel; its scales have the same shape.
        of_group = None if size == count else size
        sizes.setdefault(of_group, set()).add(rf"re:.*\.{name.rpartition('.')[2]}$")
    if len(sizes) <= 1:
        return {size: ["Linear"] for size in sizes}
    return {size: sorted(names) for size, names in sizes.items()}


def _group(scheme: OnlineScheme, targets: Sequence[str], size: int | None) -> dict[str, Any]:
    format_ = scheme.format
    weights = {
        "num_bits": 4 if isinstance(format_, Int4Online) else 8,
        "type": "float" if scheme.method == "fp8" else "int",
        "symmetric": format_.symmetric if isinstance(format_, Int4Online) else True,
        "strategy": "channel" if size is None else "group",
        "group_size": size,
        "dynamic": False,
    }
    inputs = {**weights, "strategy": "token", "dynamic": True}
    return {
        "targets": list(targets),
        "weights": weights,
        "input_activations": None if scheme.method == "int4" else inputs,
        "output_activations": None,
        "format": _FORMATS[scheme.method],
    }
