"""The tensors of a step against a token-by-token construction."""

import random

import pytest
import torch
from sampling_reference import new_sequence

from halimede.engine.runner.build_input import build_model_input
from halimede.engine.runner.sequence_state import SequenceState
from halimede.scheduler.output import NewSequence, ScheduledSequence
from halimede.scheduler.sampling_params import SamplingParams

CPU = torch.device("cpu")


def random_row(rng: random.Random, seq_id: int, block_size: int) -> tuple[ScheduledSequence, SequenceState]:
    start = rng.choice([0, rng.randrange(200)])
    chunk = rng.choice([1, rng.randrange(1, 60)])
    tokens = tuple(rng.choices(range(1000), k=start + chunk + rng.randrange(3)))
    sequence = new_sequence(SamplingParams(), prompt=tokens)
    state = SequenceState(sequence, vocab_size=1000)
    blocks = rng.sample(range(1, 500), -(-(start + chunk) // block_size) + rng.randrange(3))
    cut = rng.randrange(len(blocks) + 1)
    state.append_blocks(tuple(blocks[:cut]))
    state.append_blocks(tuple(blocks[cut:]))
    assert state.block_ids.tolist() == blocks
    needs_sample = rng.random() < 0.5
    run = tokens[start : start + chunk]
    return ScheduledSequence(seq_id, run, start, (), needs_sample), state


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_against_a_naive_construction(block_size: int) -> None:
    rng = random.Random(block_size)
    for _ in range(20):
        pairs = [random_row(rng, row, block_size) for row in range(rng.randrange(1, 7))]
        scheduled, states = [s for s, _ in pairs], [state for _, state in pairs]
        ids, positions, slots, wanted, locs = [], [], [], [], [0]
        for row, state in pairs:
            for offset, token in enumerate(row.token_ids):
                position = row.num_computed_tokens + offset
                ids.append(token)
                positions.append(position)
                block = int(state.block_ids[position // block_size])
                slots.append(block * block_size + position % block_size)
            locs.append(len(ids))
            if row.needs_sample:
                wanted.append(len(ids) - 1)
        lens = [row.num_computed_tokens + len(row.token_ids) for row in scheduled]
        width = max(-(-n // block_size) for n in lens)
        tables = [
            (state.block_ids.tolist()[: -(-n // block_size)] + [0] * width)[:width]
            for state, n in zip(states, lens, strict=True)
        ]
        found = build_model_input(scheduled, states, block_size=block_size, device=CPU)
        for tensor, expected, dtype in (
            (found.input_ids, ids, torch.int64),
            (found.positions, positions, torch.int64),
            (found.logits_indices, wanted, torch.int64),
            (found.attn.slot_mapping, slots, torch.int64),
            (found.attn.block_tables, tables, torch.int32),
            (found.attn.query_start_loc, locs, torch.int32),
            (found.attn.seq_lens, lens, torch.int32),
        ):
            assert tensor.tolist() == expected
            assert tensor.dtype == dtype
        assert found.attn.max_query_len == max(len(s.token_ids) for s in scheduled)
        assert found.attn.max_seq_len == max(lens)
        assert (
            build_model_input(
                scheduled, states, block_size=block_size, device=CPU, all_hidden_states=True
            ).outputs
            is None
        )
        if len(wanted) == len(ids):
            assert found.outputs is None
            continue
        sampled = [row for row, s in enumerate(scheduled) if s.needs_sample]
        assert found.outputs is not None
        assert found.outputs.block_tables.tolist() == [tables[row] for row in sampled]
        assert found.outputs.query_start_loc.tolist() == list(range(len(sampled) + 1))
        assert found.outputs.seq_lens.tolist() == [lens[row] for row in sampled]


def test_too_few_blocks_are_noticed() -> None:
    new: NewSequence = new_sequence(SamplingParams(), prompt=(1, 2, 3))
    state = SequenceState(new, vocab_size=10)
    state.append_blocks((4,))
    row = ScheduledSequence(0, (1, 2, 3), 0, (), True)
    with pytest.raises(AssertionError, match="too few blocks"):
        build_model_input([row], [state], block_size=2, device=CPU)
