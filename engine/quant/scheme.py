"""What a quantization method has to say for the loader to read its checkpoints.

A method is one file in this folder with a function `read(fields, source) -> QuantScheme`, and one line in
registry.py. The scheme says how each module is stored: a WeightFormat, which makes a CanonicalWeight of the
module's tensors. Models and layers know of none of it.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

from halimede.engine.quant.canonical import CanonicalWeight
from halimede.engine.quant.stored import StoredModule

ModuleKind = Literal["Linear", "Embedding"]


class WeightFormat(Protocol):
    """How the weight of one module is stored. Immutable: one may serve many modules."""

    @property
    def required(self) -> Sequence[str]:
        """Suffixes of the tensors without which there is no weight, such as ("qweight", "scales")."""
        ...

    @property
    def optional(self) -> Sequence[str]:
        """Suffixes of tensors that may be there too."""
        ...

    def check(self, stored: StoredModule) -> None:
        """Raise ModelLoadError for tensors of a wrong shape or type and for scales that are not finite.

        Called for all modules before memory is taken for any: it reads scales, not codes.
        """
        ...

    def convert(self, stored: StoredModule) -> CanonicalWeight:
        """The weight. Raises as `check` does, and for codes that cannot be."""
        ...


class QuantScheme(Protocol):
    """Which modules of a checkpoint are quantized, and how."""

    @property
    def method(self) -> str:
        """The method's name in the registry."""
        ...

    @property
    def kv_cache_scales(self) -> bool:
        """Whether the checkpoint may have scales for an 8-bit KV cache."""
        ...

    def format_of(self, name: str, kind: ModuleKind) -> WeightFormat | None:
        """How module `name` (as the model calls it, such as "model.layers.0.self_attn.q_proj") is stored.

        None: not quantized. Parts of a fused module are asked for one by one.
        """
        ...
