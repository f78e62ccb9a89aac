"""What a decode step costs the host, counted: it grows with the rows by little, and with nothing else."""

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from work_counter import Counter

from halimede.kernels.launch import intercepting
from halimede.kernels.target import TARGETS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STEPS = 16  # as many as a block has tokens see every boundary


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


def work(kind: str, sampling: str, rows: int, decoded: int = 32) -> tuple[int, int]:
    """Lines and calls of STEPS steps of so many rows that have decoded so many tokens."""
    import host_time

    watch, counter = host_time.Stopwatch(), Counter()
    intercepted = intercepting(TARGETS["sm_90"], host_time.no_kernel) if kind == "gpu" else nullcontext()
    with intercepted:
        core = host_time.make_decoding(kind, host_time.PARAMS[sampling], rows, watch)
        for _ in range(decoded):
            core.step()
        for _ in range(STEPS):
            counter.measure(core.step)
    return counter.lines, counter.calls


# What may come with a row: schedule() and update() alone take 20 lines.
@pytest.mark.parametrize(
    ("kind", "sampling", "lines", "calls"),
    [("gpu", "greedy", 28, 12), ("gpu", "drawn", 28, 12), ("cpu", "greedy", 28, 12)],
)
def test_a_row_costs_little(kind: str, sampling: str, lines: int, calls: int) -> None:
    few, many = work(kind, sampling, 16), work(kind, sampling, 144)
    of_lines, of_calls = ((large - small) / 128 / STEPS for small, large in zip(few, many, strict=True))
    assert of_lines < lines
    assert of_calls < calls


def test_a_step_without_rows_to_speak_of_costs_little() -> None:
    lines, calls = (count / STEPS for count in work("gpu", "greedy", 1))
    assert lines < 780
    assert calls < 330


def test_how_long_the_rows_are_costs_nothing() -> None:
    assert work("gpu", "drawn", 8) == work("gpu", "drawn", 8, decoded=32 + 16 * STEPS)
