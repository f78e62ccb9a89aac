"""Kernels to compile and launch where it does not matter what they compute."""

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}

# Small types stand beside large ones: every alignment has a gap before it somewhere.
TYPES = {
    "p_i8": "*i8",
    "a_i1": "i1",
    "b_fp64": "fp64",
    "c_i8": "i8",
    "d_i16": "i16",
    "e_i8": "i8",
    "f_i32": "i32",
    "g_u1": "u1",
    "p_bf16": "*bf16",
    "h_fp32": "fp32",
    "i_u64": "u64",
    "j_u8": "u8",
    "k_i64": "i64",
    "l_u16": "u16",
    "m_u32": "u32",
    "p_i64": "*i64",
    "n_i1": "i1",
}


@triton.jit
def every_type(
    p_i8, a_i1, b_fp64, c_i8, d_i16, e_i8, f_i32, g_u1, p_bf16, h_fp32, i_u64, j_u8, k_i64, l_u16, m_u32,
    p_i64, n_i1, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    tl.store(p_i8 + at, c_i8 + e_i8 + j_u8 + a_i1 + g_u1 + n_i1)
    tl.store(p_bf16 + at, (h_fp32 + b_fp64).to(tl.bfloat16))
    tl.store(p_i64 + at, i_u64.to(tl.int64) + k_i64 + d_i16 + l_u16 + m_u32 + f_i32)


@triton.jit
def product(a_ptr, b_ptr, c_ptr, K, scale, SIZE: tl.constexpr):
    row, inner = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    sums = tl.zeros((SIZE, SIZE), tl.float32)
    for start in range(0, K, SIZE):
        a = tl.load(a_ptr + row * K + start + inner)
        b = tl.load(b_ptr + (start + row) * SIZE + inner)
        sums = tl.dot(a, b, sums)
    tl.store(c_ptr + row * SIZE + inner, (sums * scale).to(tl.bfloat16))


@triton.jit
def described(a_ptr, b_ptr, rows, SIZE: tl.constexpr):
    a = tl.make_tensor_descriptor(a_ptr, [rows, SIZE], [SIZE, 1], [16, SIZE])
    b = tl.make_tensor_descriptor(b_ptr, [rows, SIZE], [SIZE, 1], [16, SIZE])
    at = tl.program_id(0) * 16
    b.store([at, 0], a.load([at, 0]) * 2)


@triton.jit
def many_arguments(
    p0, p1, p2, p3, p4, p5, p6, p7, n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, n10, BLOCK: tl.constexpr
):
    at = tl.arange(0, BLOCK)
    total = n0 + n1 + n2 + n3 + n4 + n5 + n6 + n7 + n8 + n9 + n10
    found = tl.load(p0 + at) + tl.load(p1 + at) + tl.load(p2 + at) + tl.load(p3 + at)
    found += tl.load(p4 + at) + tl.load(p5 + at) + tl.load(p6 + at)
    tl.store(p7 + at, found + total)


def compile_sample(kernel: Any, target: str, types: dict[str, str], **constants: int) -> Any:
    """Triton's CompiledKernel, without a driver. types: of the runtime arguments, in order."""
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=TARGETS[target], options={"enable_fp_fusion": True})


def machine_code(compiled: Any) -> bytes:
    """The cubin or hsaco."""
    code = compiled.asm["cubin"] if "cubin" in compiled.asm else compiled.asm["hsaco"]
    assert isinstance(code, bytes)
    return code
