"""The seam between a layer and how a step is run on a device, which is chosen once for an engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from halimede.engine.layers.norm import RMSNorm
from halimede.engine.layers.rotary import RotaryEmbedding
from halimede.engine.model_input import KVCache, ModelInput
from halimede.kernels.ops import Ops


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """What layers have in common for which a step is prepared once. window: see paged_attention."""

    window: int | None
    rotary_emb: RotaryEmbedding


class AttentionLayer(Protocol):
    """What attention must know of a layer. scale: what q k^T is multiplied by."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None


class AttentionStep(Protocol):
    """One step of the model as the layers of a group need it."""

    def attend(self, qkv: torch.Tensor, layer: AttentionLayer, kv_cache: KVCache) -> torch.Tensor:
        """Norm and rotate q and k, write the step's keys and values to the cache, then attend.

        qkv (T, H + 2K, D), which may be changed in place -> (T, H, D) contiguous, or (S, H, D) of the
        model_input's outputs.
        """
        ...


class Backend(Protocol):
    """How a forward pass is run."""

    @property
    def ops(self) -> Ops:
        """Everything but attention and matrix products."""
        ...

    def make_steps(
        self, model_input: ModelInput, groups: Sequence[LayerGroup], kv_cache: KVCache, num_heads: int
    ) -> Sequence[AttentionStep]:
        """The step for each group of layers. kv_cache: any layer's, for shape and dtype."""
        ...

    def make_output_step(
        self,
        step: AttentionStep,
        model_input: ModelInput,
        group: LayerGroup,
        kv_cache: KVCache,
        num_heads: int,
    ) -> AttentionStep:
        """`step`, which make_steps made for the group, for a last layer that attends for the outputs only."""
        ...
