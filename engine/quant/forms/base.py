"""What every form can do; layers know no more of a quantized weight than this."""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import nn

from halimede.kernels.ops import Gate

_SETTINGS = (int, str, tuple)  # of a form, decided when it is made
_ROW_BUCKETS = tuple(1 << power for power in range(4, 13))  # wherever a kernel may choose anew


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a weight is multiplied, and the type of the model's other weights.

    interpreted: with Triton's kernels on a CPU too, as tests do.
    """

    device: torch.device
    dtype: torch.dtype
    interpreted: bool = False

    @property
    def has_kernels(self) -> bool:
        """Whether products are Triton's: on a GPU where triton is installed, and where kernels are
        compiled."""
        return self.interpreted or (self.device.type != "cpu" and find_spec("triton") is not None)


@dataclass(frozen=True, slots=True)
class ActivationQuant:
    """How activations (T, K) are rounded before a product; as the arguments of per_token_quant.

    dtype: int8 or float8_e4m3fn. group_size: columns of a scale; None where it is a token's. scale: the one
    for all, float32 (1), on the device; None where they are found.
    """

    dtype: torch.dtype
    group_size: int | None = None
    scale: torch.Tensor | None = None

    def agrees_with(self, other: "ActivationQuant | None") -> bool:
        """Whether codes for the one are codes for the other. Compares the numbers of given scales; on the
        meta device, which has none, they are taken to be equal.
        """
        if other is None or (self.dtype, self.group_size) != (other.dtype, other.group_size):
            return False
        if self.scale is None or other.scale is None:
            return self.scale is other.scale
        return self.scale.is_meta or bool(torch.equal(self.scale, other.scale))


class QuantizedActivations(NamedTuple):
    """Activations as per_token_quant gives them: codes (T, K); scales float32, (T), (T, groups) or (1).

    dtype: of what they were before, and of the product's result.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype


Activations = torch.Tensor | QuantizedActivations
"""What a product takes: as they are, or rounded as its form says."""


class WeightForm(nn.Module, ABC):
    """A weight of N rows and K columns, laid out for its device.

    Its constructor works on the meta device too, and so does `forward` there: launches say what they need
    compiled. bias: (N), of the activations' type, what take_bias kept; None where nothing is added.
    """

    bias: torch.Tensor | None

    def __init__(self, shape: tuple[int, int], placement: Placement) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.device, self.dtype = placement.device, placement.dtype
        self._hold("bias", None)

    def structure(self) -> Hashable:
        """What forms that compute alike have in common: everything but the numbers in their tensors."""
        found: list[Hashable] = []
        for module in self.modules():
            found.append(type(module).__name__)
            found += [(name, value) for name, value in vars(module).items() if isinstance(value, _SETTINGS)]
            for name, tensor in module._buffers.items():
                found.append((name, None if tensor is None else (tensor.dtype, tuple(tensor.shape))))
        return tuple(found)

    @property
    def quantizes(self) -> ActivationQuant | None:
        """What `forward` rounds its activations to, so that the layer before may; None: nothing, or a
        rounding that only the form can do.
        """
        return None

    def take_bias(self, bias: torch.Tensor) -> bool:
        """Whether the form keeps `bias` (N) as its own and adds it in the product. False: its caller adds."""
        return False

    def make_gated(self, activation: Gate) -> bool:
        """Whether `forward` gives activation(gate) * up, (M, N / 2), from now on.

        gate is the first half of the rows, up the second. False: it gives both, as before.
        """
        return False

    @property
    def row_buckets(self) -> tuple[int, ...]:
        """Numbers of rows up to which `forward` launches one and the same, ascending; what is launched for
        more than the last of them is one and the same too.
        """
        return _ROW_BUCKETS

    @abstractmethod
    def forward(self, x: Activations) -> torch.Tensor:
        """x W^T: (M, K) -> (M, N), of x's type. x is quantized only if that is as `quantizes` says."""

    @abstractmethod
    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows (T) int64 of W: (T, K) float32, for embeddings."""

    def _hold(self, name: str, tensor: torch.Tensor | None) -> None:
        """Keep a tensor, on the device; on a CPU it may be the tensor itself."""
        placed = None if tensor is None else tensor.to(self.device).contiguous()
        self.register_buffer(name, placed, persistent=False)


class UnloadedForm(WeightForm):
    """The place of a weight on the meta device: shapes alone."""

    def forward(self, x: Activations) -> torch.Tensor:
        """See WeightForm."""
        assert isinstance(x, torch.Tensor), "it asks for nothing else"
        return x.new_empty(x.shape[0], self.out_features)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """See WeightForm."""
        return ids.new_empty(ids.shape[0], self.in_features, dtype=torch.float32)
