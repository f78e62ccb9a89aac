"""What a checkpoint says about its rotary position embedding."""

from dataclasses import dataclass
from typing import Literal

RopeType = Literal["default", "linear", "llama3", "yarn", "factors"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding of one model; names are those of config.json's rope_parameters.

    rotary_dim: leading dimensions of each head that are rotated (all of them unless partial_rotary_factor
        says otherwise).
    factor: context extension of "linear", "llama3" and "yarn".
    original_max_position_embeddings, low_freq_factor, high_freq_factor: "llama3", and the first "yarn".
    attention_factor: "yarn", multiplies cos and sin; None derives it from factor, mscale, mscale_all_dim.
    beta_fast, beta_slow, truncate: "yarn", the bounds of the interpolated frequencies.
    factors: "factors", what each of the rotary_dim / 2 frequencies is divided by.
    """

    rope_type: RopeType
    rope_theta: float
    rotary_dim: int
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    factors: tuple[float, ...] = ()
