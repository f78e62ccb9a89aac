"""The oracle of step_inputs, and its inputs: buffers and what rows do not need are random, so that it shows
where something is written that must stay."""

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from halimede.kernels.gpu.row_state import (
    HEADER,
    LAST_TOKEN,
    MIN_P,
    NUM_COMPUTED,
    SEED,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    random_words,
)
from halimede.kernels.spec import Case, Work

if TYPE_CHECKING:
    from halimede.kernels.gpu.step_inputs import StepArrays, StepBuffers


def step_inputs_reference(
    rows: torch.Tensor,
    step: "StepArrays",
    buffers: "StepBuffers",
    *,
    num_rows: int,
    padded_rows: int,
    block_size: int,
) -> None:
    """The oracle of step_inputs: one row at a time."""
    starts = step.query_start_loc.tolist()
    description = zip(step.slots.tolist(), step.token_offsets.tolist(), step.outputs.tolist(), strict=True)
    for row, (slot, offset, place) in enumerate(description):
        state, (first, stop) = rows[slot], starts[row : row + 2]
        begin = int(state[NUM_COMPUTED])
        end = begin + stop - first
        ids = state[LAST_TOKEN] if offset < 0 else step.tokens[offset : offset + stop - first]
        positions, table = torch.arange(begin, end), state[HEADER:]
        buffers.input_ids[first:stop] = ids
        buffers.positions[first:stop] = positions
        buffers.slot_mapping[first:stop] = (
            table[positions // block_size].long() * block_size + positions % block_size
        )
        buffers.seq_lens[row] = end
        num_blocks = -(-end // block_size)
        buffers.block_tables[row, :num_blocks] = table[:num_blocks]
        state[NUM_COMPUTED] = end
        if place >= 0:
            buffers.logits_indices[place] = stop - 1
            buffers.output_rows[place] = row
            buffers.output_slots[place] = slot
            _sampling_reference(state, buffers, place, end)
    buffers.query_start_loc[: num_rows + 1] = step.query_start_loc
    _padding_reference(buffers, slice(num_rows, padded_rows), starts[-1])


def _sampling_reference(state: torch.Tensor, buffers: "StepBuffers", place: int, position: int) -> None:
    floats = state.view(torch.float32)
    buffers.temperature[place] = floats[TEMPERATURE]
    buffers.min_p[place] = floats[MIN_P]
    buffers.top_p[place] = floats[TOP_P]
    buffers.top_k[place] = state[TOP_K]
    buffers.keys[place] = torch.stack((state.view(torch.int64)[SEED // 2], torch.tensor(position)))


def _padding_reference(buffers: "StepBuffers", padding: slice, num_tokens: int) -> None:
    for zeros in (buffers.input_ids, buffers.positions, buffers.slot_mapping, buffers.seq_lens):
        zeros[padding] = 0
    for numbers in (buffers.logits_indices, buffers.output_rows):
        numbers[padding] = torch.arange(padding.start, padding.stop)
    buffers.query_start_loc[padding.start + 1 : padding.stop + 1] = num_tokens
    buffers.temperature[padding] = 0.0
    buffers.min_p[padding] = 0.0
    buffers.top_p[padding] = 1.0
    buffers.top_k[padding] = 2**31 - 1


@dataclass(frozen=True, slots=True)
class _Row:
    """start: tokens that are computed. tokens: of the step. sampled: whether it is sampled from. given: its
    one token's id is among the step's; those of more tokens always are."""

    start: int
    tokens: int = 1
    sampled: bool = True
    given: bool = False


def _step_arrays(rows: tuple[_Row, ...], num_slots: int, gap: int, device: torch.device) -> dict[str, Any]:
    """StepArrays as keyword arguments, "step_" in front. gap: tokens of nobody before those of each row."""
    offsets, outputs, used, num_outputs = [], [], 0, 0
    for row in rows:
        listed = row.given or row.tokens > 1
        offsets.append(used + gap if listed else -1)
        used += (gap + row.tokens) * listed
        outputs.append(num_outputs if row.sampled else -1)
        num_outputs += row.sampled
    starts = [0, *accumulate(row.tokens for row in rows)]
    made = {"query_start_loc": starts, "token_offsets": offsets, "outputs": outputs}
    return {
        "step_slots": torch.randperm(num_slots, device=device)[: len(rows)].int(),
        **{f"step_{name}": torch.tensor(x, dtype=torch.int32, device=device) for name, x in made.items()},
        "step_tokens": random_words((used + 1,), device)[:used],
    }


def _buffers(max_tokens: int, max_rows: int, max_blocks: int, device: torch.device) -> dict[str, Any]:
    """StepBuffers as keyword arguments."""
    tokens, rows = (max_tokens,), (max_rows,)
    wide: dict[str, tuple[int, ...]]
    wide = {"input_ids": tokens, "positions": tokens, "slot_mapping": tokens, "keys": (max_rows, 2)}
    wide |= {"logits_indices": rows, "output_rows": rows}
    words: dict[str, tuple[int, ...]]
    words = {"seq_lens": rows, "output_slots": rows, "top_k": rows}
    words |= {"query_start_loc": (max_rows + 1,), "block_tables": (max_rows, max_blocks)}
    return {
        **{name: torch.randint(-(1 << 50), 1 << 50, s, device=device) for name, s in wide.items()},
        **{name: random_words(s, device) for name, s in words.items()},
        **{name: torch.randn(rows, device=device) for name in ("temperature", "min_p", "top_p")},
    }


def _case(
    name: str,
    rows: tuple[_Row, ...],
    *,
    block_size: int = 16,
    padded_rows: int | None = None,
    max_blocks: int = 12,
    gap: int = 0,
) -> Case:
    padded = padded_rows or len(rows)
    num_slots, num_tokens = len(rows) + 3, sum(row.tokens for row in rows)
    assert all(row.start + row.tokens <= max_blocks * block_size for row in rows)

    def make(device: torch.device) -> dict[str, Any]:
        arrays = _step_arrays(rows, num_slots, gap, device)
        state = random_words((num_slots, HEADER + max_blocks), device)
        starts = torch.tensor([row.start for row in rows], dtype=torch.int32, device=device)
        state[arrays["step_slots"].long(), NUM_COMPUTED] = starts
        buffers = _buffers(max(num_tokens, padded) + 5, padded + 2, max_blocks, device)
        options = {"num_rows": len(rows), "padded_rows": padded, "block_size": block_size}
        return {"rows": state, **arrays, **buffers, **options}

    blocks = sum(-(-(row.start + row.tokens) // block_size) for row in rows)
    return Case(name, make, Work(bytes=8 * blocks + 32 * num_tokens + 140 * len(rows)))


_MIXED = (
    _Row(0, 37),
    _Row(5),
    _Row(31),
    _Row(40, 9, sampled=False),
    _Row(47),
    _Row(15, 1, given=True),
    _Row(16, 16),
    _Row(3, 1, sampled=False, given=True),
    _Row(100, 7),
)
_DECODE = tuple(_Row((13 * n) % 150) for n in range(17))

CASES = (
    _case("one row", (_Row(7),)),
    _case("the first token", (_Row(0, 1, given=True),), max_blocks=4),
    _case("17 rows", _DECODE),
    _case("17 rows to 32", _DECODE, padded_rows=32),
    _case("3 rows to 8", _DECODE[:3], padded_rows=8),
    _case("5 rows to 8, their tokens given", tuple(_Row(n, 1, given=True) for n in range(5)), padded_rows=8),
    _case("2 rows to 8, one is not sampled", (_Row(30, 1, sampled=False), _Row(31)), padded_rows=8),
    *(_case(f"chunks beside decodes, blocks of {n}", _MIXED, block_size=n, gap=2) for n in (16, 32, 64, 128)),
    _case("chunks first in the tokens", _MIXED),
    _case("nothing is sampled", (_Row(0, 20, sampled=False), _Row(64, 33, sampled=False))),
    _case("long prompts", (_Row(3, 1100), _Row(9), _Row(0, 512)), max_blocks=72),
    _case("long table", (_Row(4100 * 16 + 5), _Row(2048 * 16 - 1), _Row(2048 * 16)), max_blocks=4104),
)

_SERVED = tuple(_Row(1000 + 7 * n % 1000) for n in range(256))
SIGNATURES = (
    _case("256 rows, blocks of 16", _SERVED, max_blocks=512),
    _case("256 rows, blocks of 64", _SERVED, block_size=64, max_blocks=128),
    _case("2048 tokens of a prompt, blocks of 32", (_Row(0, 2048),), block_size=32, max_blocks=256),
    _case("16 rows of 128k tokens, blocks of 128", (_Row(131000),) * 16, block_size=128, max_blocks=1024),
)
