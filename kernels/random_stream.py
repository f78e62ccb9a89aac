"""The noise behind random sampling: a function of (request seed, position of the new token, token id) only.

It depends on nothing else, neither the batch, the row, the step nor what was drawn before, so a request gets
the same tokens in any company, in any order and after a preemption. It is SplitMix64 (Steele, Lea, Flood:
"Fast splittable pseudorandom number generators", 2014) started at a 64-bit hash of seed and position and
read at the token's place. Being counter-based it is computed only where it is needed, gives the same 32
random bits on every device, and on a CPU costs half of torch's exponential_. (torch's CPU generator would not
do anyway: it keeps 32 bits of its seed, so different requests could share their noise.)
"""

import numpy as np
import numpy.typing as npt
import torch

_GAMMA = 0x9E3779B97F4A7C15
# (shift, multiplier) rounds of the SplitMix64 finalizer, then a last shift.
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
# The largest float32 below 1: -log1p(-u) stays finite.
_LARGEST_BELOW_ONE = 1.0 - 2.0**-24


def stream_keys(keys: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """Where the streams of keys (L, 2), pairs of seed (modulo 2^64) and position, start: int64 (L)."""
    seeds, positions = keys.view(np.uint64).T
    starts = _mix(_mix(seeds + np.uint64(_GAMMA)) ^ positions)
    return torch.from_numpy(starts.view(np.int64)).to(device)


def exponential_noise(starts: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Exp(1) variables, all > 0 and finite, float32 of the broadcast shape of the two arguments.

    starts: from stream_keys. token_ids: int64.
    """
    bits = _cpu_bits(starts, token_ids) if starts.device.type == "cpu" else torch_bits(starts, token_ids)
    # Small values decide who wins, and there float32 keeps all 32 random bits.
    uniform = bits.add_(0.5).mul_(2.0**-32).clamp_(max=_LARGEST_BELOW_ONE)
    return uniform.neg_().log1p_().neg_()


def _cpu_bits(starts: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """What torch_bits returns, in less than half the time."""
    z = token_ids.numpy().view(np.uint64) * np.uint64(_GAMMA) + starts.numpy().view(np.uint64)
    return torch.from_numpy((_mix(z) >> np.uint64(32)).astype(np.float32))


def torch_bits(starts: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """The 32 random bits of each token as float32, with int64 arithmetic that wraps around."""
    z = token_ids * _signed(_GAMMA) + starts
    for shift, multiplier in _ROUNDS:
        z ^= (z >> shift) & ((1 << (64 - shift)) - 1)
        z *= _signed(multiplier)
    z ^= (z >> _LAST_SHIFT) & ((1 << (64 - _LAST_SHIFT)) - 1)
    return ((z >> 32) & 0xFFFFFFFF).float()


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finalizer, a bijection of 64-bit integers; z, which nobody else holds, is changed."""
    for shift, multiplier in _ROUNDS:
        z ^= z >> np.uint64(shift)
        z *= np.uint64(multiplier)
    z ^= z >> np.uint64(_LAST_SHIFT)
    return z


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
