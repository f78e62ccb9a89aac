"""float8_e4m3fn in integer arithmetic, for GPUs without instructions for it; the same bits as torch's casts.

A value is sign, 4 bits of exponent with bias 7, 3 of mantissa; 448 is the largest, 0x7F and 0xFF are NaN.
Kernels see such tensors as bytes (`.view(torch.uint8)`), because Triton refuses the type on those GPUs.
"""

import triton
import triton.language as tl

E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def e4m3_to_float16(bits, NATIVE: tl.constexpr):
    """Bytes to float16, exact but for NaN, which becomes +-480: what float32_to_e4m3 writes has none."""
    if NATIVE:
        return bits.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    wide = bits.to(tl.uint16)
    # The bits as float16 with the exponent unadjusted: 2^8 too small, subnormals too.
    shifted = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return shifted.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def float32_to_e4m3(x, NATIVE: tl.constexpr):
    """float32 to bytes, rounded to nearest even; what is beyond +-448 becomes +-448. x is not NaN."""
    x = tl.minimum(tl.maximum(x, -E4M3_MAX), E4M3_MAX)
    if NATIVE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Normal: drop 20 bits of mantissa with rounding to even, and rebias the exponent by 127 - 7.
    even = (magnitude >> 20) & 1
    normal = ((magnitude + 0x7FFFF + even) >> 20) - (120 << 3)
    # Below 2^-6: adding 2^14 leaves the value's multiple of 2^-9 in the last bits, rounded by the hardware.
    subnormal = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    small = magnitude < (121 << 23)
    return (tl.where(small, subnormal, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)
