"""A kernel whose module ends every process that another one started, as a crash of LLVM would."""

import multiprocessing
import os
import sys

import triton
import triton.language as tl


@triton.jit
def deadly_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 0.0)


if multiprocessing.parent_process() is not None:
    print("LLVM ERROR: Cannot select: a test", file=sys.stderr, flush=True)
    os.abort()
