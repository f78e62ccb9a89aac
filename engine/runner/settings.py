"""What the settings left to `auto` came to for a model on a device."""

from dataclasses import dataclass

import torch

from halimede.engine.config import AttentionBackend


@dataclass(frozen=True, slots=True)
class ExecutionSettings:
    """dtype: of weights; activations: what is computed in. max_model_len: the longest that is asked for;
    the KV cache may hold less. attention: the backend, not "auto". uses_triton: whether kernels run.
    """

    device: torch.device
    dtype: torch.dtype
    activations: torch.dtype
    kv_cache_dtype: torch.dtype
    max_model_len: int
    attention: AttentionBackend

    @property
    def uses_triton(self) -> bool:
        """Whether Triton kernels run; on a CPU they are interpreted."""
        return self.device.type != "cpu" or self.attention == "triton"
