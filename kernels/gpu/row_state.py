"""The state of every running sequence, on the device: what the host and sampled tokens change in it.

rows [M, W] int32: M slots of W words, of which the constants below name the first HEADER; block ids follow,
up to W - HEADER of them. W is a multiple of 4, so that tables are read 16 bytes at a time; M * W < 2**31.

update_rows writes what the host knows, (word, value) pairs: 12 bytes each. commit_tokens writes the tokens
that were sampled to their rows, without the host having seen them: 16 bytes each. step_inputs.py reads the
rows and counts the tokens that they have computed.
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
from halimede.kernels.tuning import KernelConfig, pick_config

LAST_TOKEN = 0
"""The id of the sequence's last token, if it has been sampled."""
NUM_COMPUTED = 1
"""How many tokens have their KV in the cache."""
TEMPERATURE = 2
"""This and the next two: the bits of a float32."""
MIN_P = 3
TOP_P = 4
TOP_K = 5
SEED = 6
"""An int64, low word first."""
HEADER = 8
"""Where the block table starts."""

_LAST_TOKEN = tl.constexpr(LAST_TOKEN)
_LARGEST_MATRIX = (1 << 31) - 1


@triton.jit
def _load_run(ptr, start, size, BLOCK: tl.constexpr):
    """Elements start to start + BLOCK of `size`; 0 past the end."""
    offsets = start + tl.arange(0, BLOCK)
    # A mask that may end anywhere would cut the loads of 16 bytes apart.
    if start + BLOCK <= size:
        x = tl.load(ptr + offsets)
    else:
        x = tl.load(ptr + offsets, mask=offsets < size, other=0)
    return x


@triton.jit(do_not_specialize=["num_words"])
def _update_rows_kernel(rows_ptr, words_ptr, values_ptr, num_words, BLOCK: tl.constexpr):
    start = tl.program_id(0) * BLOCK
    words = _load_run(words_ptr, start, num_words, BLOCK)
    values = _load_run(values_ptr, start, num_words, BLOCK)
    tl.store(rows_ptr + words, values, mask=start + tl.arange(0, BLOCK) < num_words)


@triton.jit(do_not_specialize=["num_tokens", "row_words"])
def _commit_tokens_kernel(tokens_ptr, output_slots_ptr, rows_ptr, num_tokens, row_words, BLOCK: tl.constexpr):
    start = tl.program_id(0) * BLOCK
    tokens = _load_run(tokens_ptr, start, num_tokens, BLOCK)
    slots = _load_run(output_slots_ptr, start, num_tokens, BLOCK)
    there = start + tl.arange(0, BLOCK) < num_tokens
    ids = tl.maximum(tokens, 0).to(tl.int32)
    tl.store(rows_ptr + slots * row_words + _LAST_TOKEN, ids, mask=there)


def update_rows(rows: torch.Tensor, words: torch.Tensor, values: torch.Tensor) -> None:
    """rows.view(-1)[words[i]] = values[i], in place; nothing is started for no words.

    rows: [M, W] int32. words, values: (U) int32, words all different and inside of the matrix, which is not
    checked. KernelError for other shapes and types.
    """
    check_rows(rows)
    if (
        not words.dtype == values.dtype == torch.int32
        or words.dim() != 1
        or words.shape != values.shape
        or not (words.is_contiguous() and values.is_contiguous())
    ):
        raise KernelError(
            f"update_rows takes contiguous words and values (U) int32; they are {words.dtype} "
            f"{tuple(words.shape)} and {values.dtype} {tuple(values.shape)}"
        )
    variant, num_words = _update_variant(target_of(rows)), words.shape[0]
    grid = (-(-num_words // variant.constants["BLOCK"]),)
    variant.start(grid, rows, words, values, num_words)


def commit_tokens(tokens: torch.Tensor, output_slots: torch.Tensor, rows: torch.Tensor) -> None:
    """rows[output_slots[o], LAST_TOKEN] = max(tokens[o], 0), in place, for each of S tokens.

    tokens: (S) int64, negative ones are codes of errors. output_slots: (S or more) int32, different ones,
    inside of the matrix. rows: [M, W] int32. KernelError for other shapes and types.
    """
    check_rows(rows)
    if (
        tokens.dtype != torch.int64
        or output_slots.dtype != torch.int32
        or not tokens.dim() == output_slots.dim() == 1
        or output_slots.shape[0] < tokens.shape[0]
        or not (tokens.is_contiguous() and output_slots.is_contiguous())
    ):
        raise KernelError(
            f"commit_tokens takes contiguous tokens (S) int64 and at least S output_slots int32; they are "
            f"{tokens.dtype} {tuple(tokens.shape)} and {output_slots.dtype} {tuple(output_slots.shape)}"
        )
    variant, num_tokens = _commit_variant(target_of(rows)), tokens.shape[0]
    grid = (-(-num_tokens // variant.constants["BLOCK"]),)
    variant.start(grid, tokens, output_slots, rows, num_tokens, rows.shape[1])


def check_rows(rows: torch.Tensor) -> None:
    """KernelError unless they are a matrix as described above."""
    shape = rows.shape
    if len(shape) != 2 or shape[1] < HEADER or shape[1] % 4 or rows.dtype != torch.int32:
        raise KernelError(
            f"rows are [M, W] int32 with W a multiple of 4 and at least {HEADER}; they are {rows.dtype} "
            f"{tuple(shape)}"
        )
    if shape[0] * shape[1] > _LARGEST_MATRIX or not rows.is_contiguous():
        raise KernelError(
            f"rows are contiguous and of less than 2**31 words; they are {tuple(shape)} with strides "
            f"{rows.stride()}: take fewer slots or shorter block tables"
        )


@cache
def _update_variant(target: Target) -> Variant:
    config = pick_config("update_rows", target, "", 0, lambda: _heuristic(target, 128))
    return Variant(_update_rows_kernel, config)


@cache
def _commit_variant(target: Target) -> Variant:
    config = pick_config("commit_tokens", target, "", 0, lambda: _heuristic(target, 64))
    return Variant(_commit_tokens_kernel, config)


def _heuristic(target: Target, threads: int) -> KernelConfig:
    """16 bytes of int32 for each thread: few, because there are few elements."""
    return KernelConfig({"BLOCK": 4 * threads}, num_warps=max(1, threads // target.warp_size), num_stages=1)


def update_rows_reference(rows: torch.Tensor, words: torch.Tensor, values: torch.Tensor) -> None:
    """The oracle of update_rows."""
    rows.view(-1)[words.long()] = values


def commit_tokens_reference(tokens: torch.Tensor, output_slots: torch.Tensor, rows: torch.Tensor) -> None:
    """The oracle of commit_tokens: one token at a time."""
    for token, slot in zip(tokens.tolist(), output_slots.tolist(), strict=False):
        rows[slot, LAST_TOKEN] = max(token, 0)


def _run_update(**given: torch.Tensor) -> Tensors:
    update_rows(**given)
    return (given["rows"],)


def _reference_update(**given: torch.Tensor) -> Tensors:
    update_rows_reference(**given)
    return (given["rows"],)


def _run_commit(**given: torch.Tensor) -> Tensors:
    commit_tokens(**given)
    return (given["rows"],)


def _reference_commit(**given: torch.Tensor) -> Tensors:
    commit_tokens_reference(**given)
    return (given["rows"],)


def random_words(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int32 with all bits at random."""
    return torch.randint(-(1 << 31), 1 << 31, shape, device=device).int()


def _update_case(name: str, num_words: int, shape: tuple[int, int]) -> Case:
    def make(device: torch.device) -> dict[str, Any]:
        words = torch.randperm(shape[0] * shape[1], device=device)[:num_words].int()
        rows, values = random_words(shape, device), random_words((num_words,), device)
        return {"rows": rows, "words": words, "values": values}

    return Case(name, make, Work(bytes=12 * num_words))


def _commit_case(name: str, num_tokens: int, shape: tuple[int, int], *, more_slots: int = 0) -> Case:
    def make(device: torch.device) -> dict[str, Any]:
        slots = torch.randperm(shape[0], device=device)[: num_tokens + more_slots].int()
        tokens = torch.randint(-3, 8, (num_tokens,), device=device)
        tokens = tokens.where(tokens < 5, tokens * 30_000)
        return {"tokens": tokens, "output_slots": slots, "rows": random_words(shape, device)}

    return Case(name, make, Work(bytes=16 * num_tokens))


SPECS = (
    KernelSpec(
        name="update_rows",
        summary="what the host changes in the state of running sequences: (word, value) pairs",
        launcher=_run_update,
        reference=_reference_update,
        tolerance="copy",
        cases=(
            _update_case("no word", 0, (2, 8)),
            _update_case("one word", 1, (1, 8)),
            _update_case("every word", 60, (3, 20)),
            _update_case("exactly a block", 512, (40, 24)),
            _update_case("a block and one", 513, (40, 24)),
            _update_case("several blocks", 1500, (90, 24)),
        ),
        signatures=(_update_case("4096 words of 512 sequences", 4096, (512, 520)),),
        faults=(
            Fault("tl.arange(0, BLOCK) < num_words", "tl.arange(0, BLOCK) < num_words - 1"),
            Fault("start = tl.program_id(0) * BLOCK", "start = 0"),
            Fault("x = tl.load(ptr + offsets)", "x = tl.load(ptr + start) + tl.zeros_like(offsets)"),
            Fault("mask=offsets < size, other=0", "mask=offsets < size // 4 * 4, other=0"),
        ),
    ),
    KernelSpec(
        name="commit_tokens",
        summary="sampled tokens to the state of their sequences",
        launcher=_run_commit,
        reference=_reference_commit,
        tolerance="copy",
        cases=(
            _commit_case("no token", 0, (2, 8)),
            _commit_case("one token", 1, (1, 8)),
            _commit_case("odd number", 17, (40, 12)),
            _commit_case("more slots than tokens", 7, (30, 12), more_slots=9),
            _commit_case("exactly a block", 256, (300, 8)),
            _commit_case("several blocks", 700, (900, 8), more_slots=50),
        ),
        signatures=(_commit_case("256 tokens", 256, (512, 520)),),
        faults=(
            Fault("tl.maximum(tokens, 0)", "tl.maximum(tokens, -1)"),
            Fault("tl.maximum(tokens, 0)", "tl.abs(tokens)"),
            Fault("slots * row_words + _LAST_TOKEN", "slots * row_words + _LAST_TOKEN + 1"),
            Fault("tl.arange(0, BLOCK) < num_tokens", "tl.arange(0, BLOCK) < num_tokens - 1"),
            Fault("num_tokens, rows.shape[1])", "num_tokens, rows.shape[1] - 4)"),
        ),
    ),
)
