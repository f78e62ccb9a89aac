"""Lays canonical weights out for the device that they are multiplied on."""

from collections.abc import Sequence

import torch
from torch import nn

from halimede.engine.quant.canonical import (
    CanonicalWeight,
    Fp8Weight,
    GroupedWeight,
    Int8Weight,
    PlainWeight,
    join_weights,
)
from halimede.engine.quant.forms.base import ActivationQuant, Activations, Placement, WeightForm
from halimede.engine.quant.forms.fp8 import FP8
from halimede.engine.quant.forms.plain import Plain
from halimede.engine.quant.forms.w8a8 import W8A8
from halimede.engine.quant.forms.wna16 import wna16_form


class JoinedForm(WeightForm):
    """Several weights of the same inputs, one's rows after the other's, where one form does not take them."""

    def __init__(self, parts: Sequence[WeightForm]) -> None:
        shape = sum(part.out_features for part in parts), parts[0].in_features
        super().__init__(shape, Placement(parts[0].device, parts[0].dtype))
        self._parts = list(parts)
        self.parts = nn.ModuleList(parts)  # so that their tensors are found

    @property
    def quantizes(self) -> ActivationQuant | None:
        """See WeightForm. What all parts agree on."""
        first, *others = (part.quantizes for part in self._parts)
        return first if first and all(first.agrees_with(other) for other in others) else None

    @property
    def row_buckets(self) -> tuple[int, ...]:
        """See WeightForm."""
        return tuple(sorted({bucket for part in self._parts for bucket in part.row_buckets}))

    def forward(self, x: Activations) -> torch.Tensor:
        """See WeightForm."""
        return torch.cat([part(x) for part in self._parts], 1)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """See WeightForm."""
        found = torch.empty(len(ids), self.in_features, dtype=torch.float32, device=ids.device)
        first = 0
        for part in self._parts:
            inside = ((ids >= first) & (ids < first + part.out_features)).nonzero().squeeze(1)
            found[inside] = part.rows(ids[inside] - first)
            first += part.out_features
        return found


def make_form(weights: Sequence[CanonicalWeight], placement: Placement) -> WeightForm:
    """One form of the weights of a module, of which a fused one has several."""
    forms = [_form_of(weight, placement) for weight in join_weights(weights)]
    return forms[0] if len(forms) == 1 else JoinedForm(forms)


def _form_of(weight: CanonicalWeight, placement: Placement) -> WeightForm:
    if isinstance(weight, GroupedWeight):
        return wna16_form(weight, placement)
    if isinstance(weight, Int8Weight | Fp8Weight) and placement.has_kernels:
        from halimede.engine.quant.forms.scaled import KernelFP8, KernelW8A8, takes_fp8

        if isinstance(weight, Int8Weight):
            return KernelW8A8(weight, placement)
        if takes_fp8(weight, placement):
            return KernelFP8(weight, placement)
    if isinstance(weight, Int8Weight):
        return W8A8(weight, placement)
    if isinstance(weight, Fp8Weight):
        return FP8(weight, placement)
    assert isinstance(weight, PlainWeight), f"no form for {type(weight).__name__}"
    return Plain(weight, placement)
