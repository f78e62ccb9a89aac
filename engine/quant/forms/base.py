"""What every form can do; layers know no more of a quantized weight than this."""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import nn

_SETTINGS = (int, str, tuple)  # of a form, decided when it is made


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a weight is multiplied, and the type of the model's other weights."""

    device: torch.device
    dtype: torch.dtype


class WeightForm(nn.Module, ABC):
    """A weight of N rows and K columns, laid out for its device."""

    def __init__(self, shape: tuple[int, int], placement: Placement) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.device, self.dtype = placement.device, placement.dtype

    def structure(self) -> Hashable:
        """What forms that compute alike have in common: everything but the numbers in their tensors."""
        found: list[Hashable] = []
        for module in self.modules():
            found.append(type(module).__name__)
            found += [(name, value) for name, value in vars(module).items() if isinstance(value, _SETTINGS)]
            for name, tensor in module._buffers.items():
                found.append((name, None if tensor is None else (tensor.dtype, tuple(tensor.shape))))
        return tuple(found)

    @abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T: (M, K) -> (M, N), of x's type."""

    @abstractmethod
    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows (T) int64 of W: (T, K) float32, for embeddings."""

    def _hold(self, name: str, tensor: torch.Tensor | None) -> None:
        """Keep a tensor, on the device; on a CPU it may be the tensor itself."""
        placed = None if tensor is None else tensor.to(self.device).contiguous()
        self.register_buffer(name, placed, persistent=False)


class UnloadedForm(WeightForm):
    """The place of a weight on the meta device: shapes alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See WeightForm."""
        return x.new_empty(x.shape[0], self.out_features)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """See WeightForm."""
        return ids.new_empty(ids.shape[0], self.in_features, dtype=torch.float32)
