"""Rotary position embedding in place: pairs (x[i], x[i + half]) of each head turn by the token's angle i.

    y[i]        = x[i] * cos[i] - x[i + half] * sin[i]
    y[i + half] = x[i + half] * cos[i] + x[i] * sin[i]          0 <= i < half

Layouts: x (T, heads, D), any strides (q and k of a fused projection rotate as one slice); cos, sin (T, half)
float32. 2 * half may be less than D: the dimensions after it stay as they are.

Seen over both halves at once, y = x * [cos, cos] + swap(x) * [-sin, sin]: four operations, where one half
after the other takes eleven. `rotary_factors` makes the two factors, once per step for all layers.
"""

import torch

RotaryFactors = tuple[torch.Tensor, torch.Tensor]
"""What rotary_factors makes."""


def apply_rotary_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The oracle of apply_rotary: a new tensor, float64 inside, as a complex product."""
    half = cos.shape[-1]
    wide = x.double()
    turn = torch.complex(cos.double(), sin.double())[:, None]
    turned = torch.complex(wide[..., :half].contiguous(), wide[..., half : 2 * half].contiguous()) * turn
    return torch.cat((turned.real, turned.imag, wide[..., 2 * half :]), dim=-1).to(x.dtype)


def rotary_factors(cos: torch.Tensor, sin: torch.Tensor) -> RotaryFactors:
    """cos, sin (T, half) as the factors of x and of x with its halves swapped, (T, 1, 2 * half) each."""
    return torch.cat((cos, cos), dim=-1).unsqueeze(1), torch.cat((-sin, sin), dim=-1).unsqueeze(1)


def apply_rotary(x: torch.Tensor, factors: RotaryFactors) -> None:
    """Rotate x (T, heads, D) in place; computed in float32, rounded once to x's dtype."""
    own, swapped = factors
    size = own.shape[-1]
    assert own.shape == swapped.shape == (x.shape[0], 1, size), "the factors must have one row per token"
    assert size <= x.shape[-1], f"{size // 2} angles do not fit a head of {x.shape[-1]} dimensions"
    turning = x if size == x.shape[-1] else x[..., :size]
    turned = turning * own  # float32 by promotion, also for bfloat16 and float16
    turning.copy_(turned.addcmul_(turning.roll(size // 2, -1), swapped))
