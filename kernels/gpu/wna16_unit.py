"""What a unit of codes (wna16_decode.py) is multiplied as: codes less their zeros, or scaled weights.

On CUDA two codes become floats by inline PTX; the plain Triton beside it gives the same bits and serves AMD
GPUs and the interpreter.
"""

import triton
import triton.language as tl

from halimede.kernels.gpu.wna16_decode import over_words, pick


@triton.jit
def codes_of_part(
    words,
    records,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    DTYPE: tl.constexpr,
    HIP: tl.constexpr,
    PTX: tl.constexpr,
):
    """The codes of one group of the unit less its zero, [rows, 128 / PARTS], and the words with the rest."""
    CODES: tl.constexpr = 16 // BITS // PARTS
    LIFT: tl.constexpr = 1024.0 if tl.float16 == DTYPE else (128.0 if BITS == 4 else -128.0)
    WORDS: tl.constexpr = 8 * BITS
    if HAS_ZEROS:
        zeros = pick(pick(records.permute(0, 1, 3, 2), PART), 1).to(tl.float32) + LIFT
        zeros = over_words(zeros.to(DTYPE).expand_dims(2), WORDS, HIP)
    else:
        zeros = tl.full([words.shape[0], WORDS], LIFT + ZERO, tl.float32).to(DTYPE)
    weight = codes_less(words, zeros, BITS, DTYPE, PTX)
    words = shifted(words, BITS, PTX)
    if CODES >= 2:
        second = codes_less(words, zeros, BITS, DTYPE, PTX)
        words = shifted(words, BITS, PTX)
        weight = joined(weight, second)
    if CODES == 4:
        third = codes_less(words, zeros, BITS, DTYPE, PTX)
        words = shifted(words, BITS, PTX)
        weight = joined(weight, joined(third, codes_less(words, zeros, BITS, DTYPE, PTX)))
    return weight, words


@triton.jit
def scaled_unit(
    words,
    records,
    table_ptr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    DTYPE: tl.constexpr,
    HIP: tl.constexpr,
    PTX: tl.constexpr,
):
    """The weights of a unit: [rows, 128] of DTYPE, columns in order."""
    first = scaled_codes(
        words, records, table_ptr, 0, BITS, GROUP, ZERO, HAS_ZEROS, HAS_OFFSETS, DTYPE, HIP, PTX
    )
    words = shifted(words, BITS, PTX)
    second = scaled_codes(
        words, records, table_ptr, 1, BITS, GROUP, ZERO, HAS_ZEROS, HAS_OFFSETS, DTYPE, HIP, PTX
    )
    weight = joined(first, second)
    if BITS == 4:
        words = shifted(words, BITS, PTX)
        first = scaled_codes(
            words, records, table_ptr, 2, BITS, GROUP, ZERO, HAS_ZEROS, HAS_OFFSETS, DTYPE, HIP, PTX
        )
        words = shifted(words, BITS, PTX)
        second = scaled_codes(
            words, records, table_ptr, 3, BITS, GROUP, ZERO, HAS_ZEROS, HAS_OFFSETS, DTYPE, HIP, PTX
        )
        weight = joined(weight, joined(first, second))
    return weight


@triton.jit
def scaled_codes(
    words,
    records,
    table_ptr,
    PLACE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    DTYPE: tl.constexpr,
    HIP: tl.constexpr,
    PTX: tl.constexpr,
):
    """The weights whose codes are the lowest bits of words now, and lie at PLACE in them: [rows, WORDS]."""
    WORDS: tl.constexpr = 8 * BITS
    LIFT: tl.constexpr = 1024.0 if tl.float16 == DTYPE else (128.0 if BITS == 4 else -128.0)
    ROWS: tl.constexpr = words.shape[0]
    # Groups of these columns, and which of the unit's they are.
    OWN: tl.constexpr = WORDS // GROUP if GROUP < WORDS else 1
    ALL: tl.constexpr = records.shape[2]
    KINDS: tl.constexpr = records.shape[3]
    WHICH: tl.constexpr = PLACE * WORDS // GROUP // OWN if GROUP < 128 else 0
    own = pick(records.reshape(ROWS, 4, ALL // OWN, OWN, KINDS).permute(0, 1, 3, 4, 2), WHICH)
    scale = over_words(pick(own, 0), WORDS, HIP)
    if table_ptr is not None:
        codes = (words & ((1 << BITS) - 1)).to(tl.int32)
        weight = (tl.load(table_ptr + codes) * scale.to(tl.float32)).to(DTYPE)
    else:
        if HAS_ZEROS:
            zeros = over_words((pick(own, 1).to(tl.float32) + LIFT).to(DTYPE), WORDS, HIP)
        else:
            zeros = tl.full([ROWS, WORDS], LIFT + ZERO, tl.float32).to(DTYPE)
        codes = codes_less(words, zeros, BITS, DTYPE, PTX)
        if HAS_OFFSETS:
            weight = scaled(codes, scale, over_words(pick(own, KINDS - 1), WORDS, HIP), PTX)
        else:
            weight = scaled(codes, scale, None, PTX)
    return weight


@triton.jit
def shifted(words, BITS: tl.constexpr, PTX: tl.constexpr):
    """The words with their next codes at the lowest bits; what is above those does not count."""
    if not PTX:
        words = words >> BITS
    elif BITS == 4:
        words = tl.inline_asm_elementwise(
            "shr.b32 $0, $1, 4;", "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
        )
    else:
        words = tl.inline_asm_elementwise(
            "shr.b32 $0, $1, 8;", "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
        )
    return words


@triton.jit
def codes_less(words, zeros, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The codes at the lowest bits of the words less `zeros`, exact, of the 16-bit DTYPE.

    zeros: of DTYPE and the same shape, with the code's lift (LIFT) in it: a code put into the
    last bits of a float's mantissa is the code plus a power of two, and needs no conversion.
    """
    if PTX and tl.bfloat16 == DTYPE and BITS == 4:  # 0x4300 is 128, in whose last bits a code counts 1
        codes = tl.inline_asm_elementwise(
            """{
            .reg .b32 code, one;
            lop3.b32 code, $1, 0x000f000f, 0x43004300, 0xea;
            mov.b32 one, 0x3f803f80;
            neg.bf16x2 $0, $2;
            fma.rn.bf16x2 $0, code, one, $0;
            }""",
            "=&r,r,r",
            [words, zeros],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    elif PTX and tl.float16 == DTYPE and BITS == 4:  # 0x6400 is 1024
        codes = tl.inline_asm_elementwise(
            """{
            .reg .b32 code;
            lop3.b32 code, $1, 0x000f000f, 0x64006400, 0xea;
            sub.rn.f16x2 $0, code, $2;
            }""",
            "=r,r,r",
            [words, zeros],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    elif PTX and tl.float16 == DTYPE:
        codes = tl.inline_asm_elementwise(
            """{
            .reg .b32 code;
            lop3.b32 code, $1, 0x00ff00ff, 0x64006400, 0xea;
            sub.rn.f16x2 $0, code, $2;
            }""",
            "=r,r,r",
            [words, zeros],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    elif PTX:
        # A code of 8 bits does not fit beside 128: two float32, 0x4b000000 is 2^23, and back to -128..127.
        codes = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, magic, one;
            .reg .f32 first, second;
            mov.b32 magic, 0x4b000000;
            prmt.b32 low, $1, magic, 0x7440;
            prmt.b32 high, $1, magic, 0x7442;
            mov.b32 first, low;
            mov.b32 second, high;
            sub.rn.f32 first, first, 0f4B000080;
            sub.rn.f32 second, second, 0f4B000080;
            cvt.rn.bf16x2.f32 low, second, first;
            mov.b32 one, 0x3f803f80;
            neg.bf16x2 $0, $2;
            fma.rn.bf16x2 $0, low, one, $0;
            }""",
            "=&r,r,r",
            [words, zeros],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        LIFT: tl.constexpr = 1024.0 if tl.float16 == DTYPE else (128.0 if BITS == 4 else -128.0)
        codes = (words & ((1 << BITS) - 1)).to(tl.float32)
        codes = (codes + LIFT - zeros.to(tl.float32)).to(DTYPE)
    return codes


@triton.jit
def scaled(codes, scale, offset, PTX: tl.constexpr):
    """codes * scale + offset, rounded once to the type of codes; offset: None is 0. All of one shape."""
    # A product of two numbers of 8 or 11 bits is as exact in one 16-bit instruction as in float32.
    if PTX and offset is None and codes.dtype == tl.bfloat16 and scale.dtype == tl.bfloat16:
        weight = tl.inline_asm_elementwise(
            "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }",
            "=r,r,r",
            [codes, scale],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    elif PTX and offset is None and codes.dtype == tl.float16 and scale.dtype == tl.float16:
        weight = tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [codes, scale], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        wide = codes.to(tl.float32) * scale.to(tl.float32)
        if offset is not None:
            wide += offset.to(tl.float32)
        weight = wide.to(codes.dtype)
    return weight


@triton.jit
def finished(acc, PTX: tl.constexpr):
    """The sums, once they are there: what comes next may write the registers that were multiplied.

    Triton 3.6 lets Hopper's products run on into the next round of a loop, and ptxas gives it the registers
    that those still read (tests/kernels/test_gpu_wna16.py has the check of the machine code).
    """
    if PTX:
        acc = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [acc], dtype=tl.float32, is_pure=True, pack=1
        )
    return acc


@triton.jit
def joined(a, b):
    """Two tiles side by side: [N, K] each to [N, 2K]."""
    both = tl.join(a, b).permute(0, 2, 1)
    return both.reshape(a.shape[0], 2 * a.shape[1])
