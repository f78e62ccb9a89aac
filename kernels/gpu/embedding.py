"""The token embedding: y[t] = weight[ids[t]] * scale, zeros for an id that is none of the vocabulary's.

Layouts: ids (T) int64; weight [V, hidden] and y (T, hidden) contiguous. A program copies BLOCK elements of a
row. Moves 2 * T * hidden elements.

The rounding is kernels/embedding.py's: scale is rounded to the weight's dtype, the row to y's, and
their product to y's too.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from halimede.errors import KernelError
from halimede.kernels.launch import Variant, target_of
from halimede.kernels.spec import Case, Fault, KernelSpec, Tensors, Work
from halimede.kernels.target import Target
from halimede.kernels.tuning import KernelConfig, next_power_of_2, pick_config

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def embed_reference(
    input_ids: torch.Tensor, weight: torch.Tensor, scale: float = 1.0, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The oracle of embed: float64 inside, rounded once."""
    dtype = dtype or weight.dtype
    known = (input_ids >= 0) & (input_ids < weight.shape[0])
    rows = (
        weight[input_ids.where(known, 0)].to(dtype).double() * torch.tensor(scale, dtype=weight.dtype).item()
    )
    return rows.where(known[:, None], 0.0).to(dtype)


@triton.jit
def _embed_kernel(
    ids_ptr,
    weight_ptr,
    y_ptr,
    scale: tl.float32,
    VOCAB_SIZE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + token)
    size = tl.where((row >= 0) & (row < VOCAB_SIZE), HIDDEN, 0)
    x = tl.load(weight_ptr + row * HIDDEN + columns, mask=columns < size, other=0.0)
    dtype = y_ptr.dtype.element_ty
    y = x.to(dtype).to(tl.float32) * scale
    tl.store(y_ptr + token * HIDDEN + columns, y.to(dtype), mask=columns < HIDDEN)


def embed(
    input_ids: torch.Tensor, weight: torch.Tensor, scale: float = 1.0, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The vectors of input_ids (T) int64, times scale, (T, hidden) of `dtype` (None: the weight's).

    weight: [V, hidden]. scale: before it is rounded. KernelError for other shapes and types.
    """
    dtype = dtype or weight.dtype
    ids_shape = input_ids.shape
    if len(ids_shape) != 1 or input_ids.dtype != torch.int64 or not input_ids.is_contiguous():
        raise KernelError(
            f"embed takes contiguous ids (T) int64; they are {input_ids.dtype} {tuple(ids_shape)}"
        )
    variant = _variant(target_of(input_ids), weight.dtype, weight.shape, weight.is_contiguous(), dtype)
    constants, num_tokens = variant.constants, ids_shape[0]
    hidden = constants["HIDDEN"]
    y = weight.new_empty((num_tokens, hidden), dtype=dtype)
    grid = num_tokens, -(-hidden // constants["BLOCK"])
    variant.start(grid, input_ids, weight, y, _rounded(scale, weight.dtype))
    return y


@cache
def _variant(
    target: Target, weight_dtype: torch.dtype, shape: tuple[int, ...], contiguous: bool, dtype: torch.dtype
) -> Variant:
    """shape, contiguous: of the weight. dtype: of y."""
    if len(shape) != 2 or not contiguous or {weight_dtype, dtype} - set(_FLOATS):
        raise KernelError(
            f"embed takes a contiguous weight [V, hidden] of 16 or 32 bit floats and gives the same; it is "
            f"{weight_dtype} {tuple(shape)}, to become {dtype}"
        )
    vocab_size, hidden = shape
    config = pick_config("embed", target, f"{weight_dtype}", hidden, lambda: _heuristic(target, hidden))
    return Variant(_embed_kernel, config, VOCAB_SIZE=vocab_size, HIDDEN=hidden)


@cache
def _rounded(scale: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(scale, dtype=dtype, device="cpu").item())


def _heuristic(target: Target, hidden: int) -> KernelConfig:
    """16 elements for each of at most 128 threads."""
    block = min(2048, next_power_of_2(hidden))
    return KernelConfig(
        {"BLOCK": block}, num_warps=max(1, min(128, block // 16) // target.warp_size), num_stages=1
    )


def _run(**given: Any) -> Tensors:
    return (embed(**given),)


def _reference(**given: Any) -> Tensors:
    return (embed_reference(**given),)


def _case(
    name: str,
    tokens: int,
    shape: tuple[int, int],
    weight_dtype: torch.dtype,
    *,
    dtype: torch.dtype | None = None,
    scale: float = 1.0,
    unknown: tuple[int, ...] = (),
) -> Case:
    """unknown: ids of the last tokens."""

    def make(device: torch.device) -> dict[str, Any]:
        ids = torch.randint(shape[0], (tokens,), device=device)
        for at, token in enumerate(unknown):
            ids[-1 - at] = token
        weight = torch.randn(shape, device=device).to(weight_dtype)
        return {"input_ids": ids, "weight": weight, "scale": scale, "dtype": dtype}

    moved = weight_dtype.itemsize + (dtype or weight_dtype).itemsize
    return Case(name, make, Work(bytes=tokens * shape[1] * moved))


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_GEMMA = 3072**0.5

SPECS = (
    KernelSpec(
        name="embed",
        summary="rows of the token embedding, times Gemma's scale",
        launcher=_run,
        reference=_reference,
        tolerance="embedding",
        cases=(
            *(_case(f"odd size {t}", 5, (11, 577), t) for t in (_BF16, _FP16, _FP32)),
            *(_case(f"scale {t}", 3, (7, 64), t, scale=_GEMMA) for t in (_BF16, _FP16, _FP32)),
            _case("more than one block", 2, (5, 4100), _BF16, scale=_GEMMA),
            _case("ids outside of the vocabulary", 6, (9, 40), _BF16, unknown=(-1, 9, 2**40, -(2**40))),
            _case("wider result", 4, (9, 40), _BF16, dtype=_FP32, scale=_GEMMA),
            _case("narrower result", 4, (9, 40), _FP32, dtype=_BF16, scale=_GEMMA),
            _case("no token", 0, (9, 40), _FP16),
            _case("one token of one element", 1, (1, 1), _FP32),
        ),
        signatures=(
            _case("Llama 3 8B", 256, (128256, 4096), _BF16),
            _case("Gemma 3 4B", 256, (262208, 2560), _BF16, scale=2560**0.5),
        ),
        faults=(
            Fault("y = x.to(dtype).to(tl.float32) * scale", "y = x.to(dtype).to(tl.float32)"),
            Fault("(row >= 0) & (row < VOCAB_SIZE)", "(row > 0) & (row < VOCAB_SIZE)"),
            Fault("mask=columns < size, other=0.0", "mask=columns < size, other=1.0"),
            Fault("tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)", "tl.arange(0, BLOCK)"),
            Fault("_rounded(scale, weight.dtype)", "scale"),
        ),
    ),
)
