"""Rotary position embedding: the table of cosines and sines, and the frequencies of each rope type.

Position p turns the i-th pair of a head's dimensions by p * f_i, f_i = theta^(-2i / rotary_dim). Types other
than "default" change f to reach contexts longer than the model was trained on.
"""

import math

import torch
from torch import nn

from halimede.engine.layers.rope_config import RopeConfig

CosSin = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of the step's tokens, each (T, rotary_dim / 2) float32."""


class RotaryEmbedding(nn.Module):
    """Looks up the cosines and sines of positions, once per step for all layers."""

    def __init__(self, config: RopeConfig) -> None:
        super().__init__()
        self.config = config
        self._cos_sin: CosSin | None = None

    def prepare(self, device: torch.device, max_positions: int) -> None:
        """Build the table for positions 0 .. max_positions - 1 (float32, whatever the model's dtype)."""
        frequencies = rope_frequencies(self.config)
        angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies
        scale = rope_attention_factor(self.config)
        self._cos_sin = ((angles.cos() * scale).to(device), (angles.sin() * scale).to(device))

    @property
    def tables(self) -> CosSin:
        """Cosines and sines of every position, (max_positions, rotary_dim / 2)."""
        assert self._cos_sin is not None, "CausalLM.prepare was not called"
        return self._cos_sin

    def forward(self, positions: torch.Tensor) -> CosSin:
        """(T) int64 -> cosines and sines (T, rotary_dim / 2)."""
        cos, sin = self.tables
        return cos[positions], sin[positions]


def rope_frequencies(config: RopeConfig) -> torch.Tensor:
    """Radians per position of each rotated pair, (rotary_dim / 2) float32, on the CPU."""
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device="cpu") / config.rotary_dim
    base = 1.0 / config.rope_theta**exponents
    if config.rope_type == "linear":
        return base / config.factor
    if config.rope_type == "factors":
        return base / torch.tensor(config.factors, dtype=torch.float32, device="cpu")
    if config.rope_type == "llama3":
        return _llama3_frequencies(base, config)
    if config.rope_type == "yarn":
        return _yarn_frequencies(base, config)
    return base


def rope_attention_factor(config: RopeConfig) -> float:
    """What cosines and sines are multiplied by: 1 but for "yarn" (arXiv:2309.00071, section 3.4)."""
    if config.rope_type != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return _yarn_mscale(config.factor, config.mscale) / _yarn_mscale(config.factor, config.mscale_all_dim)
    return _yarn_mscale(config.factor, 1.0)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3_frequencies(base: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    """Slow frequencies are divided by `factor`, fast ones kept, those between blended (Llama 3.1)."""
    turns = config.original_max_position_embeddings * base / (2 * math.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * base / config.factor + keep * base


def _yarn_frequencies(base: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    """Dimensions that turn fewer than beta_slow times in the trained context are interpolated, those that
    turn more than beta_fast times are kept, a linear ramp over the dimensions lies between
    (arXiv:2309.00071, section 3.2)."""
    dim, trained = config.rotary_dim, config.original_max_position_embeddings

    def dimension_of(turns: float) -> float:
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = max(high - low, 0.001)  # equal bounds make the ramp a step
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    return base / config.factor * ramp + base * (1 - ramp)
