"""Finds the k-th largest logit, or the logit at which a share of the probability is reached, without sorting.

Each round reads the row once and measures what is at or above three pivots, which leaves a quarter of the
range. As soon as few enough logits are left at or above its lower end they are copied out, in order of token
id, and later rounds read only those. All sums go in an order that depends on the row alone, so the result
does too.

Floats are compared through their image: int32 with the same order, in which a range can be halved exactly.
"""

import triton
import triton.language as tl

from halimede.kernels.target import Target
from halimede.kernels.tuning import KernelConfig, next_power_of_2

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Rounds that cut the range of values evenly before the range of images is: near the top of a row the values
# are what is spread evenly, while half of all images are below 2^-1.
_EVEN_ROUNDS = tl.constexpr(4)
STAGES = tl.constexpr(4)


def row_config(size: int, target: Target) -> KernelConfig:
    """How one program reads a row of logits, 8 a thread; a small row too has several blocks."""
    block = min(2048, max(64, next_power_of_2(-(-size // 8))))
    threads = max(128, block // 8)
    # Left to itself ptxas may spill to stay at 128 registers, for a second program that is rarely there.
    options = {"maxnreg": 240}
    return KernelConfig({"BLOCK": block}, threads // target.warp_size, num_stages=1, options=options)


@triton.jit
def order_image(x):
    """The int32 of a float32's place in order; that of -0.0 is 0.0's."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == 0.0, 0, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def image_to_float(image):
    """The float32 whose image it is."""
    return tl.where(image < 0, image ^ 0x7FFFFFFF, image).to(tl.float32, bitcast=True)


@triton.jit
def load_logits(row_ptr, start, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK logits of a row from `start` on as float32, -inf past its end, and their token ids."""
    ids = start + tl.arange(0, BLOCK)
    return tl.load(row_ptr + ids, mask=ids < SIZE, other=float("-inf")).to(tl.float32), ids


@triton.jit
def load_kept(kept_ptr, num_kept, BLOCK: tl.constexpr):
    """The logits that were copied to kept_ptr, -inf past the last of them, and their token ids."""
    offsets = tl.arange(0, BLOCK)
    bits = tl.load(kept_ptr + offsets, mask=offsets < num_kept, other=-8388608)
    ids = tl.load(kept_ptr + BLOCK + offsets, mask=offsets < num_kept, other=0)
    return bits.to(tl.float32, bitcast=True), ids


@triton.jit
def _weigh(x, peak, scale, floor, p1, p2, p3, all_weight, weight1, weight2, weight3, counts):
    weight = tl.exp2((x - peak) * scale)
    all_weight += tl.where(x >= floor, weight, 0.0)
    weight1 += tl.where(x >= p1, weight, 0.0)
    weight2 += tl.where(x >= p2, weight, 0.0)
    weight3 += tl.where(x >= p3, weight, 0.0)
    counts += tl.where(x >= p3, 1049601, tl.where(x >= p2, 1025, tl.where(x >= p1, 1, 0)))
    return all_weight, weight1, weight2, weight3, counts


@triton.jit
def _measure(
    row_ptr, kept_ptr, num_kept, peak, scale, floor, p1, p2, p3, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """The weight exp2((x - peak) * scale) of what is at or above floor, p1, p2, p3; counts for p1 to p3."""
    zeros = tl.zeros([BLOCK], tl.float32)
    all_weight, weight1, weight2, weight3 = zeros, zeros, zeros, zeros
    # Three counts of up to 1023 blocks in one integer.
    counts = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, tl.where(num_kept < 0, SIZE, 0), BLOCK, num_stages=STAGES):
        x, _ = load_logits(row_ptr, start, SIZE, BLOCK)
        all_weight, weight1, weight2, weight3, counts = _weigh(
            x, peak, scale, floor, p1, p2, p3, all_weight, weight1, weight2, weight3, counts
        )
    if num_kept > 0:
        x, _ = load_kept(kept_ptr, num_kept, BLOCK)
        all_weight, weight1, weight2, weight3, counts = _weigh(
            x, peak, scale, floor, p1, p2, p3, all_weight, weight1, weight2, weight3, counts
        )
    return (
        tl.sum(all_weight),
        tl.sum(weight1),
        tl.sum(weight2),
        tl.sum(weight3),
        tl.sum(counts & 1023),
        tl.sum((counts >> 10) & 1023),
        tl.sum(counts >> 20),
    )


@triton.jit
def _append(x, ids, out_ptr, found, least, last, LIMIT: tl.constexpr):
    keep = ((x > least) | ((x == least) & (ids <= last))) & (x > float("-inf"))
    kept = keep.to(tl.int32)
    number = tl.sum(kept)
    if number > 0:
        place = found + tl.cumsum(kept, axis=0) - 1
        mask = keep & (place < LIMIT)
        tl.store(out_ptr + place, x.to(tl.int32, bitcast=True), mask=mask)
        tl.store(out_ptr + LIMIT + place, ids, mask=mask)
    return found + number


@triton.jit
def collect(
    row_ptr,
    kept_ptr,
    num_kept,
    out_ptr,
    least,
    last,
    LIMIT: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy what is above `least`, and equal to it up to token id `last`, to out_ptr in order of token id.

    out: int32, LIMIT values as bits, then LIMIT ids. Returns how many there are; at most LIMIT are copied.
    """
    found = 0
    for start in range(0, tl.where(num_kept < 0, SIZE, 0), BLOCK):
        x, ids = load_logits(row_ptr, start, SIZE, BLOCK)
        found = _append(x, ids, out_ptr, found, least, last, LIMIT)
    if num_kept > 0:
        x, ids = load_kept(kept_ptr, num_kept, BLOCK)
        found = _append(x, ids, out_ptr, found, least, last, LIMIT)
    # What one thread has written another reads.
    tl.debug_barrier()
    return found


@triton.jit
def _seek(x, ids, value, nth, seen, found):
    equal = (x == value).to(tl.int32)
    number = tl.sum(equal)
    if (seen < nth) & (seen + number >= nth):
        order = seen + tl.cumsum(equal, axis=0)
        found = tl.max(tl.where((equal > 0) & (order == nth), ids, -1))
    return seen + number, found


@triton.jit
def nth_equal(row_ptr, kept_ptr, num_kept, value, nth, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The token id of the nth (from 1) logit that equals `value`, in order of token id; -1 if none is."""
    seen, found = 0, -1
    for start in range(0, tl.where(num_kept < 0, SIZE, 0), BLOCK):
        x, ids = load_logits(row_ptr, start, SIZE, BLOCK)
        seen, found = _seek(x, ids, value, nth, seen, found)
    if num_kept > 0:
        x, ids = load_kept(kept_ptr, num_kept, BLOCK)
        seen, found = _seek(x, ids, value, nth, seen, found)
    return found


@triton.jit
def _pivots(low, high, even):
    """Three images in (low, high], the lowest first, that cut the range of values or of images evenly."""
    gap = high - low
    if even:
        bottom = image_to_float(low.to(tl.int32))
        width = image_to_float(high.to(tl.int32)) - bottom
        p1 = order_image(bottom + width * 0.25).to(tl.int64)
        p2 = order_image(bottom + width * 0.5).to(tl.int64)
        p3 = order_image(bottom + width * 0.75).to(tl.int64)
    else:
        p1 = low + ((gap + 3) >> 2)
        p2 = low + ((gap + 1) >> 1)
        p3 = low + ((3 * gap + 3) >> 2)
    least = low + 1
    return (
        tl.minimum(tl.maximum(p1, least), high),
        tl.minimum(tl.maximum(p2, least), high),
        tl.minimum(tl.maximum(p3, least), high),
    )


@triton.jit
def search(
    row_ptr,
    kept_ptr,
    num_kept,
    floor,
    bottom,
    peak,
    scale,
    share,
    goal,
    enough,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest logit t such that what is at or above it weighs `share` of all, or if share is 0 `goal`.

    floor: logits below it do not count. bottom: a value from floor on that is low enough. peak: the largest.
    scale: see _measure; 0 counts. enough: stop at a lower t once at most so many logits are at or above it.
    Returns t, the weight wanted, the weight above t, the counts at or above t and above it, and num_kept.
    """
    low = order_image(bottom).to(tl.int64)
    high = order_image(peak).to(tl.int64)
    count, above, target, weight_above = SIZE, 0, 0.0, 0.0
    step = 0
    running = 1
    while running > 0:
        closing = (low >= high) | (count <= enough)
        p1, p2, p3 = _pivots(low, high, step < _EVEN_ROUNDS)
        # The last round measures at t and just above it.
        p1 = tl.where(closing, low, p1)
        # -1 would be the image of -0.0: what is above it is above 0.0.
        beyond = tl.where(low == -1, 1, low + 1)
        p2 = tl.where(closing, beyond, p2)
        p3 = tl.where(closing, beyond, p3)
        weight, weight1, weight2, weight3, count1, count2, count3 = _measure(
            row_ptr,
            kept_ptr,
            num_kept,
            peak,
            scale,
            floor,
            image_to_float(p1.to(tl.int32)),
            image_to_float(p2.to(tl.int32)),
            image_to_float(p3.to(tl.int32)),
            SIZE,
            BLOCK,
        )
        if step == 0:
            target = tl.where(share > 0.0, share * weight, tl.minimum(goal, weight))
        if closing:
            count, above, weight_above, running = count1, count2, weight2, 0
        else:
            reach1, reach2, reach3 = weight1 >= target, weight2 >= target, weight3 >= target
            count = tl.where(reach3, count3, tl.where(reach2, count2, tl.where(reach1, count1, count)))
            high = tl.where(reach3, high, tl.where(reach2, p3 - 1, tl.where(reach1, p2 - 1, p1 - 1)))
            low = tl.where(reach3, p3, tl.where(reach2, p2, tl.where(reach1, p1, low)))
            if (num_kept < 0) & (count <= BLOCK):
                least = image_to_float(low.to(tl.int32))
                num_kept = collect(row_ptr, kept_ptr, num_kept, kept_ptr, least, SIZE, BLOCK, SIZE, BLOCK)
                num_kept = tl.minimum(num_kept, BLOCK)
        step += 1
    return image_to_float(low.to(tl.int32)), target, weight_above, count, above, num_kept
