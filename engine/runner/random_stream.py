"""The noise behind random sampling: a stream keyed by (request seed, position of the new token) only.

A token's noise depends on nothing else, neither the batch, the row, the step nor what was drawn before, so
a request gets the same tokens in any company, in any order and after a preemption.

On the CPU the stream is NumPy's Philox with (seed, position) as its 128-bit key: counter-based, the same on
every platform and NumPy version, and several times faster than torch's exponential_. torch's own CPU
generator will not do: it keeps 32 bits of its seed, so different (seed, position) pairs would collide.
On a GPU it is torch's Philox generator there, seeded with a 64-bit mix of the two.
"""

import numpy as np
import torch

_MASK64 = (1 << 64) - 1
# The largest float32 below 1: -log1p(-u) stays finite.
_LARGEST_BELOW_ONE = 1.0 - 2.0**-24


def exponential_noise(keys: list[tuple[int, int]], vocab_size: int, device: torch.device) -> torch.Tensor:
    """Exp(1) variables, float32 (len(keys), V), all > 0 and finite; row i depends only on keys[i].

    keys: (seed, position) of each row; the seed may be any integer.
    """
    if device.type == "cpu":
        return _cpu_noise(keys, vocab_size)
    noise = torch.empty(len(keys), vocab_size, dtype=torch.float32, device=device)
    generator = torch.Generator(device=device)
    for row, (seed, position) in zip(noise, keys, strict=True):
        generator.manual_seed(_mix64(seed, position))
        row.exponential_(generator=generator)
    return noise.clamp_(min=2.0**-33)


def _cpu_noise(keys: list[tuple[int, int]], vocab_size: int) -> torch.Tensor:
    uniform = np.empty((len(keys), vocab_size), dtype=np.float32)
    for row, (seed, position) in zip(uniform, keys, strict=True):
        key = np.array([seed & _MASK64, position], dtype=np.uint64)
        raw = np.random.Philox(key=key).random_raw((vocab_size + 1) // 2)
        row[:] = raw.view(np.uint32)[:vocab_size]
    # Small values decide who wins, and there float32 keeps all 32 random bits.
    noise = torch.from_numpy(uniform).add_(0.5).mul_(2.0**-32).clamp_(max=_LARGEST_BELOW_ONE)
    return noise.neg_().log1p_().neg_()


def _mix64(seed: int, position: int) -> int:
    """A 64-bit hash of the two; each is hashed in turn, so that neighbours do not meet (SplitMix64)."""
    return _splitmix64(_splitmix64(seed & _MASK64) ^ position)


def _splitmix64(state: int) -> int:
    """One output of SplitMix64 (Steele, Lea, Flood 2014), a bijection of 64-bit integers."""
    z = (state + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
