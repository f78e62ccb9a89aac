"""Every tolerance of a numerical test: (relative, absolute), for torch.testing.assert_close.

A kernel is held against its reference, which computes in float64 and rounds once. float32: a few hundred
roundings of 6e-8. bfloat16 and float16: one or two roundings of the result, 2^-8 and 2^-11. The tests
named test_a_broken_* break each op on purpose and see the tolerance catch it.
"""

import torch

KERNEL: dict[str, dict[torch.dtype, tuple[float, float]]] = {
    "norm": {torch.float32: (2e-6, 2e-6), torch.bfloat16: (1.2e-2, 1e-3), torch.float16: (1.5e-3, 1e-4)},
    "matmul": {torch.float32: (1e-5, 1e-5), torch.bfloat16: (8e-3, 8e-3)},
    # float32 rows that are rounded to 16 bits on the way in and out: products of size 1 to 4.
    "matmul of torch.bfloat16": {torch.float32: (8e-3, 1.2e-2)},
    "matmul of torch.float16": {torch.float32: (1e-3, 1.5e-3)},
    # Quantized activations: float64 is a code's place among the codes, within a half of where the value lies
    # between them; float32 the scales.
    "quantize": {torch.float64: (2e-6, 0.5001), torch.float32: (5e-7, 0.0)},
    # The same of values that were rounded to 16 bits before, once more or less in the last of them; and the
    # residual, which is rounded once.
    "norm_quantize": {
        torch.float64: (8e-3, 0.501),
        torch.float32: (8e-3, 2e-6),
        torch.bfloat16: (8e-3, 0.0),
        torch.float16: (1e-3, 0.0),
    },
    "layer_norm": {torch.float32: (3e-6, 3e-6), torch.bfloat16: (8e-3, 1e-4), torch.float16: (1e-3, 1e-5)},
    "rotary": {torch.float32: (2e-6, 2e-6), torch.bfloat16: (8e-3, 1e-4), torch.float16: (1e-3, 1e-4)},
    "rotary_kv": {torch.float32: (4e-6, 2e-6), torch.bfloat16: (8e-3, 1e-4), torch.float16: (1e-3, 1e-4)},
    # Caches of 8 bits against what was not rounded, in steps of their scale: int8 as float32, off by half a
    # step; float8_e4m3fn as float16, off by half of an eighth; scales as float64.
    "rotary_kv_8bit": {
        torch.float32: (0, 0.5005),
        torch.float16: (0.06, 1e-3),
        torch.float64: (2e-6, 0),
        torch.bfloat16: (8e-3, 1e-4),
    },
    # One product of two numbers of at most 24 bits, and copies: equal.
    "embedding": {torch.float32: (0, 0), torch.bfloat16: (0, 0), torch.float16: (0, 0)},
    "copy": {},
    # Cuts are logits, or within a rounding of the largest one; scaled logits are rounded up to four times.
    "sampling_threshold": {torch.float32: (1e-6, 1e-6)},
    "sampling_adjust": {torch.float32: (5e-7, 1e-6)},
    "sampling_draw": {},
    "packed_logprobs": {torch.float32: (1e-6, 2e-6)},
    "activation": {torch.float32: (2e-6, 2e-6), torch.bfloat16: (1.6e-2, 1e-4), torch.float16: (2e-3, 1e-4)},
    # Rounded once from sums of a few hundred products: the last bit at most.
    "gated matmul": {torch.bfloat16: (8e-3, 1e-5), torch.float16: (1e-3, 2e-6)},
    # Weights are rounded to 16 bits, or not; sums of a few hundred products, rounded once.
    "wna16 matmul": {torch.bfloat16: (8e-3, 1e-2), torch.float16: (1e-3, 1.5e-3)},
    "wna16 dequantize": {torch.bfloat16: (8e-3, 1e-6), torch.float16: (1e-3, 1e-6)},
    # Exact codes, sums of a few hundred or thousand products, rounded once. Hopper sums 128 products of FP8
    # with some 14 bits: seen on a GPU 1e-3 of results of size 0.4.
    "scaled matmul": {
        torch.float32: (1e-5, 2e-5),
        torch.bfloat16: (8e-3, 2e-3),
        torch.float16: (2e-3, 2e-3),
    },
    "attention decode": {
        torch.float32: (1e-5, 2e-6),
        torch.bfloat16: (8e-3, 4e-3),
        torch.float16: (1e-3, 5e-4),
    },
    "attention over torch.bfloat16": {torch.float32: (8e-3, 4e-3)},
    "attention over torch.float16": {torch.float32: (1e-3, 5e-4)},
    # Triton kernels: weights are rounded to 16 bits before the product with v.
    "attention prefill": {
        torch.float32: (1e-5, 2e-6),
        torch.bfloat16: (1.6e-2, 8e-3),
        torch.float16: (2e-3, 1e-3),
    },
    "attention": {torch.float32: (1e-5, 2e-6), torch.bfloat16: (1.6e-2, 8e-3), torch.float16: (2e-3, 1e-3)},
}

MODEL_LOGITS = (1e-4, 3e-4)
"""Our float32 logits (of size 1 to 10) against transformers', and in chunks against all at once.

Seen: 1.2e-4, depending on the number of threads, which decides how products are split."""

QUANTIZED_LOGITS = (1e-4, 3e-4)
"""Float32 logits (of size 1 to 10) of a quantized model against those of its dequantized weights."""

QUANTIZED_BFLOAT16 = 1.5
"""How much further than a plain bfloat16 model a quantized one may be from float32 logits, root mean square.

Both round after each operation, the quantized one its scales too where the other rounds its weights."""

W8A8_LOGITS = {"same codes": 2e-5, "one off": 0.3}
"""Float32 logits of a token (of size 1 to 10) against transformers' with compressed-tensors' rounding.

An activation that lies between two codes but for its last bits may be rounded to the other one, which moves
the logits of its token, and a little those of later ones; without that they agree. Seen: 4e-6 and 0.12."""

ROUNDED_ACTIVATIONS = 0.25
"""Logits of a bfloat16 model whose norms round to 8 bits in Triton's kernels against torch's norms and a
rounding apart: root mean square, in standard deviations. A norm that is off in its last bit may be off by a
code, which has 3 bits in float8. Seen: 0.14; unrelated logits are 1.4 apart."""

QUANTIZED_KERNELS = {"int4": 0.035, "int8": 0.07, "fp8": 0.2, "fp8 in blocks": 0.16}
"""Logits of a quantized bfloat16 model by Triton's kernels against those of a CPU's forms: root mean square,
in standard deviations. Both round after each operation, and an 8-bit activation may be off by a code, which
has 3 bits in float8. Seen: 0.026, 0.052, 0.15 and 0.12; unrelated logits are 1.4 apart."""

ROPE_TABLE = (1e-6, 2e-5)
"""Cosines and sines against transformers' at positions up to 256 (float32 angles differ by 1e-5 there)."""


def assert_kernel_close(actual: torch.Tensor, expected: torch.Tensor, op: str) -> None:
    """Hold an op's result against its reference with the tolerance of its dtype."""
    rtol, atol = KERNEL[op][expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
