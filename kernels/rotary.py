"""Rotary position embedding in place: pairs (x[i], x[i + half]) of each head turn by the token's angle i.

    y[i]        = x[i] * cos[i] - x[i + half] * sin[i]
    y[i + half] = x[i + half] * cos[i] + x[i] * sin[i]          0 <= i < half

Layouts: x (T, heads, D), any strides (q and k of a fused projection rotate as one slice); cos, sin (T, half)
float32. 2 * half may be less than D: the dimensions after it stay as they are.
"""

import torch


def apply_rotary_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The oracle of apply_rotary: a new tensor, float64 inside, as a complex product."""
    half = cos.shape[-1]
    wide = x.double()
    turn = torch.complex(cos.double(), sin.double())[:, None]
    turned = torch.complex(wide[..., :half].contiguous(), wide[..., half : 2 * half].contiguous()) * turn
    return torch.cat((turned.real, turned.imag, wide[..., 2 * half :]), dim=-1).to(x.dtype)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate x (T, heads, D) in place; computed in float32, rounded once to x's dtype."""
    half = cos.shape[-1]
    assert cos.shape == sin.shape == (x.shape[0], half), "cos and sin must have one row per token"
    assert 2 * half <= x.shape[-1], f"{half} angles do not fit a head of {x.shape[-1]} dimensions"
    first, second = x[..., :half], x[..., half : 2 * half]
    cos, sin = cos[:, None], sin[:, None]
    turned = first * cos - second * sin  # float32 by promotion, also for bfloat16 and float16
    second.copy_(second * cos + first * sin)
    first.copy_(turned)
