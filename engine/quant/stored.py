"""The tensors that a checkpoint holds of one quantized module, read with checks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from halimede.errors import ModelLoadError

_AGAIN = "download the checkpoint again, or quantize it again"


@dataclass(frozen=True, slots=True)
class StoredModule:
    """Tensors of one module, by their suffix: "qweight" of "model.layers.0.mlp.down_proj.qweight".

    name: the module's in the model. out_features, in_features: N and K of its weight.
    names: the full name in the checkpoint of each suffix that is there. read: gives a tensor by its full
    name, where: the file that it lies in.
    """

    name: str
    out_features: int
    in_features: int
    names: Mapping[str, str]
    read: Callable[[str], torch.Tensor]
    where: Callable[[str], str]

    def __contains__(self, suffix: str) -> bool:
        return suffix in self.names

    def get(
        self, suffix: str, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]
    ) -> torch.Tensor:
        """A tensor of one of these shapes and types. ModelLoadError, naming tensor and file, otherwise."""
        if suffix not in self.names:
            raise ModelLoadError(
                f"the checkpoint has no {self.name}.{suffix}, without which this quantized weight cannot be "
                f"read; {_AGAIN}"
            )
        tensor = self.read(self.names[suffix])
        if tensor.dtype not in dtypes:
            listed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise self.error(suffix, f"is of type {str(tensor.dtype).removeprefix('torch.')}, not {listed}")
        if tuple(tensor.shape) not in [tuple(shape) for shape in shapes]:
            listed = " or ".join(str(tuple(shape)) for shape in dict.fromkeys(shapes))
            raise self.error(
                suffix,
                f"has the shape {tuple(tensor.shape)}, not {listed}, which a weight of "
                f"({self.out_features}, {self.in_features}) has by the quantization's settings",
            )
        return tensor

    def scales(
        self,
        suffix: str,
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[torch.dtype] = (torch.float16, torch.bfloat16, torch.float32),
    ) -> torch.Tensor:
        """A tensor of scales: as `get`, and ModelLoadError where one is NaN or infinite."""
        tensor = self.get(suffix, shapes, dtypes)
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise self.error(suffix, f"has {bad} scales that are NaN or infinite")
        return tensor

    def whole_groups(self, group_size: int) -> int:
        """Groups in a row. ModelLoadError where the columns are not a multiple of the group."""
        if group_size < 1 or self.in_features % group_size:
            file = next((f"{self.where(name)}: " for name in self.names.values()), "")
            raise ModelLoadError(
                f"{file}the {self.in_features} columns of {self.name} are not a multiple of "
                f"group_size={group_size}; correct the checkpoint's quantization settings, or {_AGAIN}"
            )
        return self.in_features // group_size

    def error(self, suffix: str, fact: str) -> ModelLoadError:
        """What is wrong with a tensor that is there."""
        name = self.names[suffix]
        return ModelLoadError(f"{self.where(name)}: the tensor {name} {fact}; {_AGAIN}")
