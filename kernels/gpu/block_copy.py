"""Copies whole blocks inside a layer's KV cache: k and v, and their scales, of block pairs[p, 0] to block
pairs[p, 1].

Layouts: caches [N, K, B, D] of any dtype and scales [N, K, B], contiguous: a block is a run of bytes, moved
as 32-bit words, four at a time; pairs (P, 2) int64. Moves 4 * P * K * B * D elements.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from halimede.errors import KernelError
from halimede.kernels.launch import launch, target_of
from halimede.kernels.spec import Case, Fault, KernelSpec, Tensors, Work
from halimede.kernels.target import Target
from halimede.kernels.tuning import KernelConfig, next_power_of_2, pick_config


def copy_blocks_reference(pairs: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """The oracle of copy_blocks, of two tensors: one block at a time."""
    for source, destination in pairs.tolist():
        k[destination] = k[source]
        v[destination] = v[source]


@triton.jit
def _copy_blocks_kernel(pairs_ptr, k_ptr, v_ptr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64)
    words = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = words < WORDS
    source = tl.load(pairs_ptr + 2 * pair) * WORDS + words
    destination = tl.load(pairs_ptr + 2 * pair + 1) * WORDS + words
    k = tl.load(k_ptr + source, mask=mask)
    v = tl.load(v_ptr + source, mask=mask)
    tl.store(k_ptr + destination, k, mask=mask)
    tl.store(v_ptr + destination, v, mask=mask)


def copy_blocks(
    pairs: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Copy blocks in place, pairs (P, 2) int64 of (source, destination). KernelError for wrong shapes.

    Destinations are distinct and none is a source: the order is free. k_scale, v_scale: [N, K, B] if scales
    are per token and head; those of a whole cache are not given.
    """
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64 or not pairs.is_contiguous():
        raise KernelError(
            f"copy_blocks takes contiguous pairs (P, 2) int64; they are {pairs.dtype} {tuple(pairs.shape)}"
        )
    _copy(pairs, k_cache, v_cache)
    if k_scale is not None and v_scale is not None:
        if not k_scale.shape == v_scale.shape == k_cache.shape[:3]:
            raise KernelError(
                f"copy_blocks takes scales {tuple(k_cache.shape[:3])}, of every token and head; they are "
                f"{tuple(k_scale.shape)} and {tuple(v_scale.shape)}"
            )
        _copy(pairs, k_scale, v_scale)
    elif k_scale is not None or v_scale is not None:
        raise KernelError("copy_blocks takes both scales or neither; one is missing")


def _copy(pairs: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if k.shape != v.shape or k.dtype != v.dtype or not (k.is_contiguous() and v.is_contiguous()):
        raise KernelError(
            f"copy_blocks takes k and v contiguous and alike; they are {tuple(k.shape)} {k.dtype} and "
            f"{tuple(v.shape)} {v.dtype}"
        )
    k, v = _as_words(k, v)
    words, target = k.shape[1], target_of(pairs)
    config = pick_config("copy_blocks", target, f"{k.dtype}", words, lambda: _heuristic(target, words))
    grid = (pairs.shape[0], -(-words // config.blocks["BLOCK"]))
    launch(_copy_blocks_kernel, grid, pairs, k, v, config=config, WORDS=words)


def _as_words(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as (N, words) of 32 bits, or bytes if a block is no multiple of a word."""
    k, v = (x.view(torch.uint8).flatten(1) for x in (k, v))
    if all(size % 4 == 0 for size in (k.shape[1], k.storage_offset(), v.storage_offset())):
        return k.view(torch.int32), v.view(torch.int32)
    return k, v


def _heuristic(target: Target, words: int) -> KernelConfig:
    """16 words of k and of v for each of at most 128 threads."""
    block = min(2048, next_power_of_2(words))
    return KernelConfig(
        {"BLOCK": block}, num_warps=max(1, min(128, block // 16) // target.warp_size), num_stages=1
    )


def _run(**given: Any) -> Tensors:
    copy_blocks(**given)
    return _bits(given)


def _reference(**given: Any) -> Tensors:
    copy_blocks_reference(given["pairs"], given["k_cache"], given["v_cache"])
    if "k_scale" in given:
        copy_blocks_reference(given["pairs"], given["k_scale"], given["v_scale"])
    return _bits(given)


def _bits(given: dict[str, Any]) -> Tensors:
    return tuple(x.view(torch.uint8) for name, x in given.items() if name != "pairs")


def _case(
    name: str, num_pairs: int, shape: tuple[int, int, int, int], dtype: torch.dtype, *, scales: bool = False
) -> Case:
    def make(device: torch.device) -> dict[str, Any]:
        order = torch.randperm(shape[0], device=device)[: 2 * num_pairs]
        made = {"pairs": order.view(num_pairs, 2)}
        for name in ("k_cache", "v_cache"):
            made[name] = (torch.randn(shape, device=device) * 20).to(dtype)
        if scales:
            made |= {name: torch.rand(shape[:3], device=device) for name in ("k_scale", "v_scale")}
        return made

    size = torch.Size(shape[1:]).numel() * dtype.itemsize + 4 * scales * shape[1] * shape[2]
    return Case(name, make, Work(bytes=4 * num_pairs * size))


_BF16, _E4M3, _INT8 = torch.bfloat16, torch.float8_e4m3fn, torch.int8

SPECS = (
    KernelSpec(
        name="copy_blocks",
        summary="whole blocks of the KV cache to other blocks",
        launcher=_run,
        reference=_reference,
        tolerance="copy",
        cases=(
            *(
                _case(f"{t}", 3, (9, 2, 16, 24), t)
                for t in (_BF16, torch.float16, torch.float32, _E4M3, _INT8)
            ),
            _case("bytes that fill no word", 2, (5, 1, 3, 5), _INT8),
            _case("more than one program", 2, (5, 3, 16, 80), torch.float32),
            _case("scales", 3, (8, 3, 16, 8), _E4M3, scales=True),
            _case("no pair", 0, (4, 1, 16, 8), _BF16),
            _case("one pair", 1, (2, 1, 1, 2), _BF16),
        ),
        signatures=(
            _case("Llama 3 8B", 64, (2048, 8, 16, 128), _BF16),
            _case("Llama 3 8B, int8 and scales", 64, (2048, 8, 16, 128), _INT8, scales=True),
        ),
        faults=(
            Fault("v = tl.load(v_ptr + source, mask=mask)", "v = tl.load(k_ptr + source, mask=mask)"),
            Fault("tl.load(pairs_ptr + 2 * pair + 1)", "tl.load(pairs_ptr + 2 * pair)"),
            Fault("mask = words < WORDS", "mask = words < WORDS - 1"),
            Fault("tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)", "tl.arange(0, BLOCK)"),
            Fault("_copy(pairs, k_scale, v_scale)", "pass"),
        ),
    ),
)
