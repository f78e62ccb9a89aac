"""The work list of decode attention: which pieces of the rows' KV there are in a step.

A row that decodes has one query token; the keys it sees, at positions max(0, seq_len - sliding_window) ..
seq_len - 1, are cut at multiples of `split_size`, absolute positions, so a row is cut the same way whatever
else is in the batch. work_offsets (R + 1) counts the splits of the rows before each: 0 for rows that do not
decode. It is made on the device, once per step and sliding window, and nothing of it is known to the host:
a CUDA graph that holds it stays right as the rows grow.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from halimede.errors import KernelError
from halimede.kernels.gpu.attention_cases import ROWS, make_step
from halimede.kernels.launch import Variant, target_of
from halimede.kernels.spec import Case, Fault, KernelSpec, Tensors, Work
from halimede.kernels.target import Target
from halimede.kernels.tuning import KernelConfig, next_power_of_2, pick_config, tuned_bucket


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """Where rows of several splits leave their parts; one is enough for all layers and windows of a model.

    A slot is a split of one row and kv head. accumulators (slots, H / K, D) float32: sums of p v.
    statistics (slots, 2, H / K) float32: largest score, in units of log2(e), and sum of p. counters (R * K)
    int32: how many splits of a row and kv head are done; 0 between launches. Only launches that follow one
    another on a stream may share it.
    """

    accumulators: torch.Tensor
    statistics: torch.Tensor
    counters: torch.Tensor


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """What paged_attention_decode needs besides the step's tensors.

    work_offsets (R + 1) int32. max_splits: of one row. The same plan serves every layer of its window.
    """

    work_offsets: torch.Tensor
    workspace: DecodeWorkspace
    split_size: int
    sliding_window: int | None
    max_splits: int


@triton.jit(do_not_specialize=["num_rows"])
def _attention_decode_plan_kernel(
    query_start_loc_ptr,
    seq_lens_ptr,
    work_offsets_ptr,
    num_rows,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    before = 0
    tl.store(work_offsets_ptr, 0)
    for first in range(0, num_rows, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        there = rows < num_rows
        start = tl.load(query_start_loc_ptr + rows, mask=there, other=0)
        stop = tl.load(query_start_loc_ptr + rows + 1, mask=there, other=0)
        end = tl.load(seq_lens_ptr + rows, mask=there, other=0)
        splits = tl.cdiv(end, SPLIT)
        if WINDOW > 0:
            splits -= tl.maximum(end - WINDOW, 0) // SPLIT
        splits = tl.where(stop - start == 1, splits, 0)
        tl.store(work_offsets_ptr + 1 + rows, before + tl.cumsum(splits), mask=there)
        before += tl.sum(splits)


def default_split_size(max_seq_len: int) -> int:
    """Tokens of a split, a power of two: about 128 splits of the longest sequence, 256 to 2048 tokens each.

    Shorter ones would spend their time on the reduction, longer ones leave processors idle at few rows.
    """
    return min(2048, max(256, next_power_of_2(-(-max_seq_len // 128))))


def max_splits(max_seq_len: int, split_size: int, sliding_window: int | None) -> int:
    """The most splits that a row can touch."""
    splits = -(-max_seq_len // split_size)
    return splits if sliding_window is None else min(splits, -(-(sliding_window - 1) // split_size) + 1)


def decode_workspace(
    max_rows: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_seq_len: int,
    device: torch.device,
    sliding_window: int | None = None,
    split_size: int | None = None,
) -> DecodeWorkspace:
    """A workspace for steps of up to max_rows rows.

    It takes 4 * max_rows * splits * H * (D + 2) bytes, splits being max_splits(...): 136 MB for 256 rows of
    8192 tokens of Llama-3-8B (H 32, D 128) in splits of 256.
    """
    split_size = split_size or default_split_size(max_seq_len)
    slots = max_rows * num_kv_heads * max_splits(max_seq_len, split_size, sliding_window)
    group = num_heads // num_kv_heads
    return DecodeWorkspace(
        torch.empty(slots, group, head_dim, dtype=torch.float32, device=device),
        torch.empty(slots, 2, group, dtype=torch.float32, device=device),
        torch.zeros(max_rows * num_kv_heads, dtype=torch.int32, device=device),
    )


def plan_decode(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_seq_len: int,
    sliding_window: int | None,
    split_size: int | None = None,
    workspace: DecodeWorkspace | None = None,
) -> DecodePlan:
    """The plan of a step: query_start_loc (R + 1) int32, seq_lens (R) int32.

    max_seq_len: no sequence is longer while the plan is used. split_size: tokens, a power of two of 16 and
    more; None is default_split_size(max_seq_len), for a max_seq_len that is the same at every step, because
    rows must always be cut alike. workspace: to be shared; None makes one for this plan.
    Raises KernelError for wrong shapes and a workspace that is too small.
    """
    rows, target = seq_lens.shape[0], target_of(seq_lens)
    split_size = split_size or default_split_size(max_seq_len)
    _check_rows(query_start_loc, seq_lens, rows)
    if max_seq_len < 0 or (sliding_window is not None and sliding_window < 1):
        raise KernelError(
            f"max_seq_len is {max_seq_len} and must not be negative; sliding_window is {sliding_window} and "
            "must be positive or None"
        )
    variant = _variant(
        target, tuned_bucket("attention_decode_plan", target, rows), split_size, sliding_window
    )
    splits = max_splits(max_seq_len, split_size, sliding_window)
    if workspace is not None:
        _check_workspace(workspace, rows * num_kv_heads, splits, (num_heads // num_kv_heads, head_dim))
    else:
        workspace = decode_workspace(
            rows,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_seq_len=max_seq_len,
            device=seq_lens.device,
            sliding_window=sliding_window,
            split_size=split_size,
        )
    offsets = seq_lens.new_empty(rows + 1)
    variant.start((1,), query_start_loc, seq_lens, offsets, rows)
    return DecodePlan(offsets, workspace, split_size, sliding_window, splits)


@cache
def _variant(target: Target, rows: int, split_size: int, sliding_window: int | None) -> Variant:
    """rows: see tuned_bucket. Checks split_size."""
    if split_size < 16 or split_size & (split_size - 1):
        raise KernelError(f"split_size {split_size} is not a power of two of 16 and more")
    config = pick_config("attention_decode_plan", target, "", rows, _heuristic)
    return Variant(_attention_decode_plan_kernel, config, WINDOW=sliding_window or 0, SPLIT=split_size)


def _check_workspace(workspace: DecodeWorkspace, counters: int, splits: int, slot: tuple[int, int]) -> None:
    """counters: rows * kv heads; splits: of each; slot: (H / K, D)."""
    accumulators, given = workspace.accumulators.shape, workspace.counters.shape[0]
    if accumulators[1:] != slot or accumulators[0] < counters * splits or given < counters:
        raise KernelError(
            f"the workspace has accumulators {tuple(accumulators)} and {given} counters; the step needs "
            f"{(counters * splits, *slot)} and {counters}: make it with decode_workspace for the largest step"
        )


def _check_rows(query_start_loc: torch.Tensor, seq_lens: torch.Tensor, rows: int) -> None:
    for name, tensor, size in (("query_start_loc", query_start_loc, rows + 1), ("seq_lens", seq_lens, rows)):
        if tensor.shape != (size,) or tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise KernelError(
                f"plan_decode needs a contiguous int32 {name} of shape ({size},); it is "
                f"{tuple(tensor.shape)} {tensor.dtype}"
            )


def _heuristic() -> KernelConfig:
    return KernelConfig({"BLOCK": 1024}, num_warps=4, num_stages=1)


def _run(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, split_size: int, sliding_window: int | None
) -> Tensors:
    plan = plan_decode(
        query_start_loc,
        seq_lens,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        max_seq_len=4096,
        sliding_window=sliding_window,
        split_size=split_size,
    )
    return (plan.work_offsets,)


def work_offsets_reference(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, split_size: int, sliding_window: int | None
) -> Tensors:
    """The splits that hold a visible key, counted one key at a time."""
    counts = [0]
    for row, end in enumerate(seq_lens.tolist()):
        decodes = int(query_start_loc[row + 1] - query_start_loc[row]) == 1
        first = 0 if sliding_window is None else max(0, end - sliding_window)
        counts.append(len({position // split_size for position in range(first, end)}) if decodes else 0)
    return (torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32),)


def _case(name: str, rows: tuple[tuple[int, int], ...], split_size: int, window: int | None = None) -> Case:
    def make(device: torch.device) -> dict[str, Any]:
        step = make_step(device, rows, heads=1, kv_heads=1, head_dim=1)
        lengths = {name: step[name] for name in ("query_start_loc", "seq_lens")}
        return {**lengths, "split_size": split_size, "sliding_window": window}

    return Case(name, make, Work(bytes=12 * len(rows)))


SPECS = (
    KernelSpec(
        name="attention_decode_plan",
        summary="work list of decode attention: prefix sum of the rows' KV splits",
        launcher=_run,
        reference=work_offsets_reference,
        tolerance="attention decode",
        cases=(
            *(_case(name, rows, 16) for name, rows in ROWS.items()),
            _case("split 32, window 20", ROWS["decode"], 32, 20),
            _case("split 16, window 1", ROWS["mixed"], 16, 1),
            _case("split 16, window 16", (*ROWS["decode"], *ROWS["mixed"], (1, 32)), 16, 16),
            _case("window longer than the rows", ROWS["decode"], 16, 500),
            _case("more rows than a block", ((1, 33), (2, 40), (0, 3)) * 400, 32),
        ),
        signatures=(
            _case("full attention", ((1, 100),) * 256, 256),
            _case("window 1024", ((1, 100),) * 256, 256, 1024),
        ),
        faults=(
            Fault("stop - start == 1", "stop - start >= 1"),
            Fault("tl.cdiv(end, SPLIT)", "end // SPLIT"),
            Fault("end - WINDOW, 0", "end - WINDOW - 1, 0"),
            Fault("before += tl.sum(splits)", "before += 0"),
        ),
    ),
)
