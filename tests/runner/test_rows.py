"""A step's tensors, of a CPU's rows and a GPU's (interpreted), against a token-by-token construction."""

import random
from dataclasses import dataclass, field

import pytest
import torch
from sampling_reference import new_sequence

from halimede.engine.model_input import ModelInput
from halimede.engine.runner.device_rows import DeviceRows
from halimede.engine.runner.host_rows import HostRows
from halimede.engine.runner.row_table import RowTable, StepPlan
from halimede.engine.runner.rows import RowLimits, Rows
from halimede.engine.runner.sampling_metadata import build_sampling_metadata
from halimede.scheduler.output import ScheduledSequence, SchedulerOutput
from halimede.scheduler.sampling_params import SamplingParams

CPU = torch.device("cpu")
VOCAB, MAX_ROWS, MAX_LEN, MAX_TOKENS = 50, 5, 150, 300


@dataclass
class Known:
    """A sequence as the scheduler would keep it."""

    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    computed: int = 0


class Life:
    """Sequences that come, run in chunks, are sampled from, and go; slots are used again."""

    def __init__(self, seed: int, block_size: int) -> None:
        self.rng = random.Random(seed)
        self.block_size = block_size
        self.known: dict[int, Known] = {}
        self.count = 0
        self.forget: list[int] = []

    def step(self) -> SchedulerOutput:
        for seq_id in list(self.known):
            if self.rng.random() < 0.15:
                del self.known[seq_id]
                self.forget.append(seq_id)
        forget, self.forget = tuple(self.forget), []
        rows = []
        while len(self.known) < MAX_ROWS and (not self.known or self.rng.random() < 0.4):
            rows.append(self.introduce())
        for seq_id, known in list(self.known.items()):
            if seq_id not in {row.seq_id for row in rows} and self.rng.random() < 0.8:
                rows.append(self.run(seq_id, known))
        self.rng.shuffle(rows)
        return SchedulerOutput(0, tuple(rows), forget)

    def introduce(self) -> ScheduledSequence:
        rng = self.rng
        known = Known(rng.choices(range(VOCAB), k=rng.choice((1, 2, rng.randrange(3, 100)))))
        known.computed = rng.choice((0, rng.randrange(len(known.tokens))))
        new = new_sequence(SamplingParams(temperature=0), prompt=tuple(known.tokens))
        self.count += 1
        self.known[self.count] = known
        start = known.computed
        return self.run(self.count, known)._replace(new=new, num_computed_tokens=start)

    def run(self, seq_id: int, known: Known) -> ScheduledSequence:
        rng, start = self.rng, known.computed
        count = rng.choice((len(known.tokens) - start, rng.randint(1, len(known.tokens) - start)))
        known.computed += count
        missing = max(0, -(-known.computed // self.block_size) - len(known.blocks))
        if missing or not known.blocks:
            missing += rng.randrange(3)
        blocks = tuple(
            rng.sample(range(1, 500), min(missing, -(-MAX_LEN // self.block_size) - len(known.blocks)))
        )
        known.blocks += blocks
        sampled = known.computed == len(known.tokens)
        plain = sampled and count == 1 and not blocks
        return ScheduledSequence(seq_id, count, None if plain else start, blocks, sampled)


def naive(life: Life, output: SchedulerOutput, block_size: int) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {name: [] for name in ("input_ids", "positions", "slots", "wanted", "lens")}
    locs = [0]
    for row in output.scheduled:
        known = life.known[row.seq_id]
        for position in range(known.computed - row.num_tokens, known.computed):
            found["input_ids"].append(known.tokens[position])
            found["positions"].append(position)
            block = known.blocks[position // block_size]
            found["slots"].append(block * block_size + position % block_size)
        locs.append(len(found["input_ids"]))
        found["lens"].append(known.computed)
        if row.needs_sample:
            found["wanted"].append(locs[-1] - 1)
    return found | {"locs": locs}


def assert_inputs(found: ModelInput, life: Life, output: SchedulerOutput, block_size: int) -> None:
    expected = naive(life, output, block_size)
    for tensor, name, dtype in (
        (found.input_ids, "input_ids", torch.int64),
        (found.positions, "positions", torch.int64),
        (found.logits_indices, "wanted", torch.int64),
        (found.attn.slot_mapping, "slots", torch.int64),
        (found.attn.query_start_loc, "locs", torch.int32),
        (found.attn.seq_lens, "lens", torch.int32),
    ):
        assert (name, tensor.tolist()) == (name, expected[name])
        assert tensor.dtype == dtype
    counts = [row.num_tokens for row in output.scheduled]
    assert found.attn.max_query_len == max(counts)
    assert found.attn.max_seq_len == max(expected["lens"])
    assert found.attn.num_decode_rows == counts.count(1)
    tables = [
        life.known[row.seq_id].blocks[: -(-n // block_size)]
        for row, n in zip(output.scheduled, expected["lens"], strict=True)
    ]
    assert [t[: len(e)] for t, e in zip(found.attn.block_tables.tolist(), tables, strict=True)] == tables
    if len(expected["wanted"]) == len(expected["input_ids"]):
        assert found.outputs is None
        return
    sampled = [number for number, row in enumerate(output.scheduled) if row.needs_sample]
    assert found.outputs is not None
    shown = found.outputs.block_tables.tolist()
    assert [t[: len(tables[row])] for t, row in zip(shown, sampled, strict=True)] == [
        tables[row] for row in sampled
    ]
    assert found.outputs.query_start_loc.tolist() == list(range(len(sampled) + 1))
    assert found.outputs.seq_lens.tolist() == [expected["lens"][row] for row in sampled]


def sample(rows: Rows, plan: StepPlan, seed: int) -> list[int]:
    logits = torch.randn(len(plan.layout.sampled), VOCAB, generator=torch.Generator().manual_seed(seed))
    metadata = build_sampling_metadata(plan, vocab_size=VOCAB)
    tokens: list[int] = rows.choose_with(plan)(logits, metadata).tokens.tolist()
    assert tokens == logits.argmax(1).tolist()
    return tokens


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("kind", ["host", "device"])
def test_a_random_life(kind: str, block_size: int) -> None:
    limits = RowLimits(MAX_ROWS, MAX_TOKENS, MAX_LEN, block_size)
    table, life = RowTable(MAX_ROWS, VOCAB), Life(block_size, block_size)
    rows: Rows = HostRows(table.columns, limits, VOCAB) if kind == "host" else DeviceRows(limits, CPU)
    for number in range(120 if kind == "host" else 25):
        output = life.step()
        plan = table.plan(output)
        assert (plan is None) == (not output.scheduled)
        if plan is None:
            continue
        assert_inputs(rows.prepare(plan), life, output, block_size)
        if len(plan.layout.sampled):
            tokens = sample(rows, plan, number)
            for seq_id, token in zip(plan.layout.sampled_seq_ids, tokens, strict=True):
                life.known[seq_id].tokens.append(token)
                if len(life.known[seq_id].tokens) == MAX_LEN:
                    del life.known[seq_id]
                    life.forget.append(seq_id)
    assert life.count > MAX_ROWS


def test_a_cpus_tables_hold_the_null_block_where_nothing_is_yet() -> None:
    limits = RowLimits(2, MAX_TOKENS, MAX_LEN, 4)
    table = RowTable(2, VOCAB)
    rows = HostRows(table.columns, limits, VOCAB)
    new = new_sequence(SamplingParams(), prompt=tuple(range(12)))
    longer = ScheduledSequence(1, 12, 0, (4, 5, 6), True, new)
    for output, expected in (
        (SchedulerOutput(0, (ScheduledSequence(0, 5, 0, (1, 2, 3), False, new),)), [[1, 2]]),
        (SchedulerOutput(1, (ScheduledSequence(0, 2, 5, (), False), longer)), [[1, 2, 0], [4, 5, 6]]),
        (
            SchedulerOutput(
                2,
                (
                    ScheduledSequence(2, 4, 0, (9,), False, new),
                    longer._replace(new=None, new_block_ids=(7,), num_computed_tokens=12, num_tokens=1),
                ),
                (0,),
            ),
            [[9, 0, 0, 0], [4, 5, 6, 7]],
        ),
    ):
        plan = table.plan(output)
        assert plan is not None
        assert rows.prepare(plan).attn.block_tables.tolist() == expected


def test_padding_stands_for_nothing() -> None:
    limits = RowLimits(4, MAX_TOKENS, MAX_LEN, 16)
    table, rows = RowTable(4, VOCAB), DeviceRows(limits, CPU)
    new = new_sequence(SamplingParams(temperature=0), prompt=(7, 8))
    plan = table.plan(SchedulerOutput(0, (ScheduledSequence(0, 1, 1, (3,), True, new),)))
    assert plan is not None
    found = rows.prepare(plan, 4)
    assert found.input_ids.tolist() == [8, 0, 0, 0]
    assert found.attn.slot_mapping.tolist() == [3 * 16 + 1, 0, 0, 0]
    assert found.attn.query_start_loc.tolist() == [0, 1, 1, 1, 1]
    assert found.attn.seq_lens.tolist() == [2, 0, 0, 0]
    assert found.attn.max_seq_len == MAX_LEN
    again = rows.decode_input(4)
    for ours, theirs in (
        (found.input_ids, again.input_ids),
        (found.attn.block_tables, again.attn.block_tables),
    ):
        assert ours.data_ptr() == theirs.data_ptr()
    rows.clear(3)
    assert rows.decode_input(3).attn.seq_lens.tolist() == [0, 0, 0]
    assert rows.decode_input(3).attn.query_start_loc.tolist() == [0, 0, 0, 0]


def test_too_few_blocks_are_noticed() -> None:
    table = RowTable(1, VOCAB)
    rows = HostRows(table.columns, RowLimits(1, MAX_TOKENS, MAX_LEN, 2), VOCAB)
    new = new_sequence(SamplingParams(), prompt=(1, 2, 3))
    plan = table.plan(SchedulerOutput(0, (ScheduledSequence(0, 3, 0, (4,), True, new),)))
    assert plan is not None
    with pytest.raises(AssertionError, match="too few blocks"):
        rows.prepare(plan)


def test_a_row_that_failed_runs_token_0_until_that_is_noticed() -> None:
    limits = RowLimits(2, MAX_TOKENS, MAX_LEN, 16)
    table = RowTable(2, VOCAB)
    for rows in (HostRows(table.columns, limits, VOCAB), DeviceRows(limits, CPU)):
        new = new_sequence(SamplingParams(temperature=0), prompt=(7, 8))
        plan = table.plan(SchedulerOutput(0, (ScheduledSequence(0, 2, 0, (3,), True, new),)))
        assert plan is not None
        rows.prepare(plan)
        logits = torch.full((1, VOCAB), torch.nan)
        metadata = build_sampling_metadata(plan, vocab_size=VOCAB)
        assert rows.choose_with(plan)(logits, metadata).tokens.tolist() == [-1]
        plan = table.plan(SchedulerOutput(1, (ScheduledSequence(0, 1, 2, (), True),)))
        assert plan is not None
        assert rows.prepare(plan).input_ids.tolist() == [0]
