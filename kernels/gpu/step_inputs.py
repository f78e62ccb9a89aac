"""What the model and the sampler read in a step, from the state of its rows and a short description of it.

In: rows [M, W] int32, see row_state.py; StepArrays. Out: StepBuffers, which stay where they are, so that CUDA
graphs may hold them; and in rows the number of computed tokens, which grows by those of the step.

One program per row: n = its tokens, start those computed before. input_ids, positions start + i,
slot_mapping block_id * B + position % B, query_start_loc, seq_lens start + n, ceil((start + n) / B) blocks of
its table; for a row that is sampled from, at its place o: where its logits come from and its token goes to,
its sampling parameters, and its key, (seed, start + n): the position of the token to be sampled.
Rows from num_rows to padded_rows stand for nothing, in graphs of steps where every row has one token: token
r is 0 at position 0 of slot 0, in the null block; its row is of length 0, greedy, with filters that keep all.

Reads and writes 8 bytes a block of the tables, 32 bytes a token, and about 140 bytes a row.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from operator import attrgetter
from typing import Any

import torch
import triton
import triton.language as tl

from halimede.errors import KernelError
from halimede.kernels.gpu import step_inputs_cases as cases
from halimede.kernels.gpu.row_state import (
    HEADER,
    LAST_TOKEN,
    MIN_P,
    NUM_COMPUTED,
    SEED,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    check_rows,
)
from halimede.kernels.launch import Variant, target_of
from halimede.kernels.spec import Fault, KernelSpec, Tensors
from halimede.kernels.target import Target
from halimede.kernels.tuning import KernelConfig, pick_config

_LAST_TOKEN = tl.constexpr(LAST_TOKEN)
_NUM_COMPUTED = tl.constexpr(NUM_COMPUTED)
_TEMPERATURE = tl.constexpr(TEMPERATURE)
_MIN_P = tl.constexpr(MIN_P)
_TOP_P = tl.constexpr(TOP_P)
_TOP_K = tl.constexpr(TOP_K)
_SEED = tl.constexpr(SEED)
_HEADER = tl.constexpr(HEADER)
_EVERY_TOKEN = tl.constexpr((1 << 31) - 1)


@dataclass(frozen=True, slots=True)
class StepArrays:
    """A step of R rows, as int32 tensors on the device, contiguous.

    slots (R): different rows of the state. query_start_loc (R + 1): each row's first token in the step, at
    least one token a row. token_offsets (R): where the row's token ids start in `tokens`; -1 is a row of one
    token, the last one of its state. outputs (R): the row's place among those that are sampled from, or -1.
    tokens (P): token ids; of P = 0 only the dtype matters.
    """

    slots: torch.Tensor
    query_start_loc: torch.Tensor
    token_offsets: torch.Tensor
    outputs: torch.Tensor
    tokens: torch.Tensor


@dataclass(frozen=True, slots=True)
class StepBuffers:
    """What step_inputs writes: as large as the largest step, contiguous. KernelError for other shapes.

    input_ids, positions, slot_mapping (max_tokens) int64; query_start_loc (max_rows + 1), seq_lens
    (max_rows), block_tables (max_rows, max_blocks) int32. By place among the rows that are sampled from,
    (max_rows): logits_indices, the row's last token, and output_rows, the row, int64; output_slots, its slot,
    int32; temperature, min_p, top_p float32; top_k int32; keys (max_rows, 2) int64, seed and position.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    logits_indices: torch.Tensor
    output_rows: torch.Tensor
    output_slots: torch.Tensor
    temperature: torch.Tensor
    min_p: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor
    keys: torch.Tensor

    def __post_init__(self) -> None:
        # Here, not at each of the many steps that use them.
        tables = self.block_tables.shape
        for name, (shape, dtype) in _layout(self.input_ids.shape[0], tables[0], tables[-1]).items():
            tensor: torch.Tensor = getattr(self, name)
            if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
                raise KernelError(
                    f"the step's buffer {name} must be contiguous {shape} {dtype}; it is "
                    f"{tuple(tensor.shape)} {tensor.dtype}: use make_step_buffers"
                )


_in_order = attrgetter(*(field.name for field in fields(StepBuffers)))


def _layout(
    max_tokens: int, max_rows: int, max_blocks: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each of StepBuffers."""
    tokens, rows = ((max_tokens,), torch.int64), (max_rows,)
    return {
        **dict.fromkeys(("input_ids", "positions", "slot_mapping"), tokens),
        "query_start_loc": ((max_rows + 1,), torch.int32),
        "block_tables": ((max_rows, max_blocks), torch.int32),
        **dict.fromkeys(("seq_lens", "output_slots", "top_k"), (rows, torch.int32)),
        **dict.fromkeys(("logits_indices", "output_rows"), (rows, torch.int64)),
        **dict.fromkeys(("temperature", "min_p", "top_p"), (rows, torch.float32)),
        "keys": ((max_rows, 2), torch.int64),
    }


def make_step_buffers(max_tokens: int, max_rows: int, max_blocks: int, device: torch.device) -> StepBuffers:
    """Buffers of zeros. max_blocks: of a row, W - HEADER of the state's rows."""
    layout = _layout(max_tokens, max_rows, max_blocks)
    return StepBuffers(
        **{name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in layout.items()}
    )


@triton.jit(do_not_specialize=["num_rows", "row_units"])
def _step_inputs_kernel(
    rows_ptr,
    slots_ptr,
    starts_ptr,
    token_offsets_ptr,
    outputs_ptr,
    tokens_ptr,
    input_ids_ptr,
    positions_ptr,
    slot_mapping_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    block_tables_ptr,
    logits_indices_ptr,
    output_rows_ptr,
    output_slots_ptr,
    temperature_ptr,
    min_p_ptr,
    top_p_ptr,
    top_k_ptr,
    keys_ptr,
    num_rows,
    row_units,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """starts: the step's query_start_loc. row_units: W / 4."""
    row = tl.program_id(0)
    first = tl.load(starts_ptr + tl.minimum(row, num_rows))
    stop = tl.load(starts_ptr + tl.minimum(row + 1, num_rows))
    tl.store(query_start_loc_ptr + row + 1, stop)
    if row == 0:
        tl.store(query_start_loc_ptr, first)
    if row < num_rows:
        slot = tl.load(slots_ptr + row)
        # A product with a constant: the compiler then knows that tables start at multiples of 16 bytes.
        state_ptr = rows_ptr + slot * (row_units * 4)
        count = stop - first
        # All threads need the old value and one of them writes the new one, which no other may read. A scalar
        # atomic is that: one thread reads and writes at once, and the others get from it what it has read.
        start = tl.atomic_add(state_ptr + _NUM_COMPUTED, count, sem="relaxed")
        end = start + count
        tl.store(seq_lens_ptr + row, end)
        last_token, offset = tl.load(state_ptr + _LAST_TOKEN), tl.load(token_offsets_ptr + row)
        listed = tl.where(offset >= 0, count, 0)
        for before in range(0, count, TOKENS):
            tokens = before + tl.arange(0, TOKENS)
            there, position = tokens < count, start + tokens
            ids = tl.load(tokens_ptr + offset + tokens, mask=tokens < listed, other=last_token)
            block_ids = tl.load(state_ptr + _HEADER + position // BLOCK_SIZE, mask=there, other=0)
            tl.store(input_ids_ptr + first + tokens, ids, mask=there)
            tl.store(positions_ptr + first + tokens, position, mask=there)
            slots = block_ids.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
            tl.store(slot_mapping_ptr + first + tokens, slots, mask=there)
        blocks = tl.cdiv(end, BLOCK_SIZE)
        table_ptr = block_tables_ptr + row.to(tl.int64) * (row_units * 4 - _HEADER)
        for before in range(0, blocks, BLOCKS):
            columns = before + tl.arange(0, BLOCKS)
            # Whole units are read, which the row has; what it does not use of the last one is not written.
            ids = tl.load(state_ptr + _HEADER + columns, mask=columns < tl.cdiv(blocks, 4) * 4, other=0)
            tl.store(table_ptr + columns, ids, mask=columns < blocks)
        place = tl.load(outputs_ptr + row)
        if place >= 0:
            tl.store(logits_indices_ptr + place, stop - 1)
            tl.store(output_rows_ptr + place, row)
            tl.store(output_slots_ptr + place, slot)
            temperature, min_p = tl.load(state_ptr + _TEMPERATURE), tl.load(state_ptr + _MIN_P)
            top_p, top_k = tl.load(state_ptr + _TOP_P), tl.load(state_ptr + _TOP_K)
            low, high = tl.load(state_ptr + _SEED), tl.load(state_ptr + _SEED + 1)
            tl.store(temperature_ptr + place, temperature.to(tl.float32, bitcast=True))
            tl.store(min_p_ptr + place, min_p.to(tl.float32, bitcast=True))
            tl.store(top_p_ptr + place, top_p.to(tl.float32, bitcast=True))
            tl.store(top_k_ptr + place, top_k)
            seed = (high.to(tl.int64) << 32) | low.to(tl.uint32, bitcast=True).to(tl.int64)
            tl.store(keys_ptr + 2 * place, seed)
            tl.store(keys_ptr + 2 * place + 1, end)
    else:
        tl.store(input_ids_ptr + row, 0)
        tl.store(positions_ptr + row, 0)
        tl.store(slot_mapping_ptr + row, 0)
        tl.store(seq_lens_ptr + row, 0)
        tl.store(logits_indices_ptr + row, row)
        tl.store(output_rows_ptr + row, row)
        tl.store(temperature_ptr + row, 0.0)
        tl.store(min_p_ptr + row, 0.0)
        tl.store(top_p_ptr + row, 1.0)
        tl.store(top_k_ptr + row, _EVERY_TOKEN)


def step_inputs(
    rows: torch.Tensor,
    step: StepArrays,
    buffers: StepBuffers,
    *,
    num_rows: int,
    padded_rows: int,
    block_size: int,
) -> None:
    """Write a step's buffers, and count its tokens as computed in rows [M, W]; see the module's docstring.

    num_rows: R. padded_rows: at least R, more only if every row has one token. Of the buffers, what a step
    does not need stays as it is: the rest of a row's table; for padding also its table, output_slots and
    keys. Not checked, because only the device knows: that the step's tokens fit into the buffers, that slots
    are different ones, that tables have the blocks which the tokens need. KernelError for wrong shapes.
    """
    check_rows(rows)
    _check_step(step, num_rows)
    width, (max_rows, max_blocks) = rows.shape[1], buffers.block_tables.shape
    if max_blocks != width - HEADER:
        raise KernelError(
            f"the buffers have tables of {max_blocks} blocks and rows of {width} words have "
            f"{width - HEADER}; give the latter to make_step_buffers"
        )
    if not num_rows <= padded_rows <= min(max_rows, buffers.input_ids.shape[0]):
        raise KernelError(
            f"{num_rows} rows padded to {padded_rows} do not fit into buffers of {max_rows} rows and "
            f"{buffers.input_ids.shape[0]} tokens; padded_rows is at least num_rows and at most these"
        )
    variant = _variant(target_of(rows), block_size)
    variant.start(
        (padded_rows,),
        rows,
        step.slots,
        step.query_start_loc,
        step.token_offsets,
        step.outputs,
        step.tokens,
        *_in_order(buffers),
        num_rows,
        width // 4,
    )


def _check_step(step: StepArrays, num_rows: int) -> None:
    sized = (step.slots, step.token_offsets, step.outputs, step.query_start_loc)
    wanted = (num_rows, num_rows, num_rows, num_rows + 1)
    for tensor, size in zip(sized, wanted, strict=True):
        if tensor.dtype != torch.int32 or tensor.shape != (size,) or not tensor.is_contiguous():
            raise KernelError(
                f"step_inputs takes contiguous int32 slots, token_offsets, outputs ({num_rows}) and "
                f"query_start_loc ({num_rows + 1}) for num_rows = {num_rows}; one is {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )
    if step.tokens.dtype != torch.int32:
        raise KernelError(f"step_inputs takes int32 tokens; they are {step.tokens.dtype}")


@cache
def _variant(target: Target, block_size: int) -> Variant:
    if block_size < 1 or block_size & (block_size - 1):
        raise KernelError(f"block_size {block_size} is not a power of two")
    config = pick_config("step_inputs", target, "", block_size, lambda: _heuristic(target))
    return Variant(_step_inputs_kernel, config, BLOCK_SIZE=block_size)


def _heuristic(target: Target) -> KernelConfig:
    """128 threads: 4 tokens each, and 16 blocks, so that the tables of most rows are read at once."""
    return KernelConfig(
        {"TOKENS": 512, "BLOCKS": 2048}, num_warps=max(1, 128 // target.warp_size), num_stages=1
    )


def _called(function: Callable[..., None], given: dict[str, Any]) -> Tensors:
    """What `function` changes, called as step_inputs is with the tensors of a case."""
    step = StepArrays(*(given[f"step_{field.name}"] for field in fields(StepArrays)))
    buffers = StepBuffers(*(given[field.name] for field in fields(StepBuffers)))
    options = {name: given[name] for name in ("num_rows", "padded_rows", "block_size")}
    function(given["rows"], step, buffers, **options)
    changed = (given["rows"], *_in_order(buffers))
    return tuple(x.view(torch.int32) if x.dtype == torch.float32 else x for x in changed)


def _run(**given: Any) -> Tensors:
    return _called(step_inputs, given)


def _reference(**given: Any) -> Tensors:
    return _called(cases.step_inputs_reference, given)


SPECS = (
    KernelSpec(
        name="step_inputs",
        summary="a step's tensors for model and sampler from the state of its rows",
        launcher=_run,
        reference=_reference,
        tolerance="copy",
        cases=cases.CASES,
        signatures=cases.SIGNATURES,
        faults=(
            Fault("position % BLOCK_SIZE", "tokens % BLOCK_SIZE"),
            Fault("block_ids.to(tl.int64) * BLOCK_SIZE", "(block_ids * BLOCK_SIZE).to(tl.int64)"),
            Fault("range(0, count, TOKENS)", "range(0, 1, TOKENS)"),
            Fault("range(0, blocks, BLOCKS)", "range(0, 1, BLOCKS)"),
            Fault("blocks = tl.cdiv(end, BLOCK_SIZE)", "blocks = end // BLOCK_SIZE"),
            Fault("mask=columns < blocks)", "mask=columns < tl.cdiv(blocks, 4) * 4)"),
            Fault("_NUM_COMPUTED, count, sem", "_NUM_COMPUTED, 1, sem"),
            Fault("tl.where(offset >= 0, count, 0)", "tl.where(offset > 0, count, 0)"),
            Fault("other=last_token", "other=0"),
            Fault("low.to(tl.uint32, bitcast=True).to(tl.int64)", "low.to(tl.int64)"),
            Fault("2 * place + 1, end)", "2 * place + 1, end - 1)"),
            Fault("state_ptr + _MIN_P)", "state_ptr + _TOP_P)"),
            Fault("logits_indices_ptr + place, stop - 1", "logits_indices_ptr + place, first"),
            Fault("output_rows_ptr + place, row", "output_rows_ptr + place, place"),
            Fault("tl.store(seq_lens_ptr + row, 0)", "pass"),
            Fault("output_slots_ptr + place, slot", "output_slots_ptr + place, row"),
        ),
    ),
)
