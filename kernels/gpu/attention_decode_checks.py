"""What decode attention takes."""

from collections.abc import Mapping

import torch

from halimede.errors import KernelError
from halimede.kernels.gpu.attention_decode_plan import DecodePlan

_LARGEST_GROUP = 64
_HEAD_DIMS = range(16, 257)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CODES = (torch.float8_e4m3fn, torch.int8)
"""Dtypes of caches that have scales."""


def check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    plan: DecodePlan,
    out: torch.Tensor,
) -> None:
    """Raise KernelError for tensors that do not fit together; see paged_attention_decode."""
    if q.dim() != 3 or q.dtype not in _DTYPES or q.stride(2) != 1 or q.stride(1) != q.shape[2]:
        raise KernelError(
            f"decode attention takes q (T, H, D) with strides (any, D, 1) in one of {_DTYPES}; got "
            f"{tuple(q.shape)}, strides {q.stride()}, {q.dtype}"
        )
    if out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
        raise KernelError(
            f"out must be contiguous, {tuple(q.shape)} {q.dtype}; it is {tuple(out.shape)} {out.dtype}"
        )
    for cache in (k_cache, v_cache):
        if cache.dim() != 4 or cache.shape != k_cache.shape or not cache.is_contiguous():
            raise KernelError(
                f"decode attention takes contiguous caches (N, K, B, D); they are {tuple(k_cache.shape)} and "
                f"{tuple(v_cache.shape)}"
            )
        if cache.dtype != k_cache.dtype or cache.dtype not in (q.dtype, *CODES):
            raise KernelError(
                f"caches must both be {q.dtype}, as q, or one of {CODES}; they are {k_cache.dtype} and "
                f"{v_cache.dtype}"
            )
    heads, kv_heads, head_dim = q.shape[1], k_cache.shape[1], q.shape[2]
    if head_dim != k_cache.shape[3] or head_dim not in _HEAD_DIMS:
        raise KernelError(
            f"head_dim is {head_dim} in q, {k_cache.shape[3]} in the cache; it must be 16 to 256"
        )
    if heads % kv_heads or heads // kv_heads > _LARGEST_GROUP:
        raise KernelError(
            f"{heads} heads over {kv_heads} kv heads: decode attention takes 1 to {_LARGEST_GROUP} for each"
        )
    rows = seq_lens.shape[0]
    expected = {
        "block_tables": (block_tables, (rows, *block_tables.shape[1:2])),
        "query_start_loc": (query_start_loc, (rows + 1,)),
        "seq_lens": (seq_lens, (rows,)),
        "the plan's work_offsets": (plan.work_offsets, (rows + 1,)),
    }
    _check_lengths(expected)


def _check_lengths(expected: Mapping[str, tuple[torch.Tensor, tuple[int, ...]]]) -> None:
    for name, (tensor, shape) in expected.items():
        if (
            tensor.shape != shape
            or tensor.dtype != torch.int32
            or (tensor.numel() and tensor.stride(-1) != 1)
        ):
            raise KernelError(
                f"{name} must be int32 {shape} with unit stride; it is {tensor.dtype} {tuple(tensor.shape)}"
            )


def check_options(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    plan: DecodePlan,
    sliding_window: int | None,
    sinks: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """Raise KernelError for options that do not fit the tensors, which `check` has passed, or the plan."""
    if sliding_window != plan.sliding_window:
        raise KernelError(
            f"sliding_window is {sliding_window}, but the plan was made for {plan.sliding_window}; make a "
            "plan for each window"
        )
    slot = (q.shape[1] // k_cache.shape[1], q.shape[2])
    if plan.workspace.accumulators.shape[1:] != slot:
        raise KernelError(
            f"the plan is for {tuple(plan.workspace.accumulators.shape[1:])} heads and sizes, not {slot}"
        )
    if sinks is not None and (sinks.shape != (q.shape[1],) or sinks.dtype != torch.float32):
        raise KernelError(
            f"sinks must be float32 ({q.shape[1]},); they are {sinks.dtype} {tuple(sinks.shape)}"
        )
    shapes = ((1,), tuple(k_cache.shape[:3])) if k_cache.dtype in CODES else (None,)
    given = tuple(None if scale is None else tuple(scale.shape) for scale in (k_scale, v_scale))
    if given[0] != given[1] or given[0] not in shapes:
        raise KernelError(
            f"k_scale and v_scale of a {k_cache.dtype} cache must have the same of these shapes: {shapes}; "
            f"they have {given}"
        )
    for scale in (k_scale, v_scale):
        if scale is not None and (scale.dtype != torch.float32 or not scale.is_contiguous()):
            raise KernelError(f"k_scale and v_scale must be contiguous float32; one is {scale.dtype}")
