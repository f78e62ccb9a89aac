"""How a step's work grows, counted instead of timed: Python's function calls and lines are deterministic."""

import pytest
from scheduler_driver import Driver
from work_counter import Counter

BLOCK = 16


def decoding(running: int, *, context: int = 40, waiting: int = 0, finished: int = 0) -> Driver:
    """A scheduler whose sequences decode, in a pool with room for all of them."""
    max_len = context + 8 * BLOCK
    driver = Driver(
        block_size=BLOCK,
        max_model_len=max_len,
        max_num_seqs=running,
        num_blocks=1 + running * (max_len // BLOCK + 1),
        max_num_batched_tokens=running * max_len,
    )
    driver.scheduler.check_integrity = lambda: None  # type: ignore[method-assign]  # not part of a step
    for index in range(finished):
        driver.add(f"finished {index}", [index, *range(2 * BLOCK)], max_tokens=1)
        driver.step()
    for index in range(running):
        # Staggered: each step, one sequence in BLOCK_SIZE fills a block and one begins the next.
        driver.add(f"running {index}", [index, *range(1000, 999 + context + index % BLOCK)], max_tokens=None)
    driver.step()
    for index in range(waiting):
        driver.add(f"waiting {index}", [index, *range(3000, 3000 + context)])
    driver.step()
    assert (driver.scheduler.num_running, driver.scheduler.num_waiting) == (running, waiting)
    return driver


def work(driver: Driver, steps: int = BLOCK) -> tuple[int, int]:
    """Lines and calls of that many steps (as many as a block has tokens see every boundary)."""
    counter = Counter()
    for _ in range(steps):
        counter.measure(driver.scheduler_step)
    return counter.lines, counter.calls


def test_each_running_sequence_costs_the_same() -> None:
    costs = [work(decoding(running)) for running in (16, 32, 64, 128)]
    for few, more, many in zip(costs, costs[1:], costs[2:], strict=False):
        for small, middle, large in zip(few, more, many, strict=True):
            assert large - middle == 2 * (middle - small)


@pytest.mark.parametrize("name", ["finished", "context", "waiting"])
def test_nothing_else_costs_anything(name: str) -> None:
    # Once as many have finished as the pool has room for, every block that is taken held something.
    values = {"finished": (400, 800, 1600), "context": (40, 408, 4008), "waiting": (1, 50, 500)}[name]
    costs = {work(decoding(32, **{name: value})) for value in values}
    assert len(costs) == 1


def test_a_sequence_inside_its_block_takes_few_lines_and_calls() -> None:
    """The whole of schedule() and update(): what keeps 256 sequences below 0.3 ms."""
    few, many = (work(decoding(running)) for running in (16, 144))
    lines, calls = ((large - small) / 128 / BLOCK for small, large in zip(few, many, strict=True))
    assert lines < 32, lines
    assert calls < 12, calls


def test_the_counter_sees_work_that_grows_with_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    update = Driver.scheduler_step

    def slow(driver: Driver) -> None:
        update(driver)
        for sequence in driver.scheduler._running:
            for _ in sequence.block_table:
                pass

    monkeypatch.setattr(Driver, "scheduler_step", slow)
    assert work(decoding(16)) < work(decoding(16, context=408))
