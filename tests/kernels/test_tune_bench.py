"""What tuning measures with: differences of results, graphs, and inputs that no cache holds."""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from halimede.kernels import tune_bench
from halimede.kernels.spec import Case
from halimede.kernels.tune_bench import difference


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.2),
        ([0.0], [0.0], 0.0),
        ([1.0], [0.0], math.inf),
        ([math.nan, 1.0], [1.0, 1.0], math.inf),
        ([], [], 0.0),
        ([1.0], [1.0, 1.0], math.inf),
    ],
)
def test_difference_is_a_part_of_the_largest_value(
    ours: list[float], theirs: list[float], expected: float
) -> None:
    assert difference(torch.tensor(ours), torch.tensor(theirs)) == pytest.approx(expected)


def test_integers_must_be_equal() -> None:
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 2])) == 0
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == math.inf
    assert difference(torch.tensor([1.0]), torch.tensor([1])) == math.inf


@pytest.mark.parametrize(("call_ms", "passes"), [(4.0, 1), (0.01, 151), (1e-5, 1000)])
def test_a_graph_is_some_milliseconds_long(
    call_ms: float, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[int] = []

    def capture(calls: Sequence[Callable[[], Any]], passes: int) -> int:
        captured.append(passes)
        return passes * len(calls)

    monkeypatch.setattr(tune_bench, "_graph", capture)
    monkeypatch.setattr(tune_bench, "_replay_ms", lambda num_calls: num_calls * call_ms)
    calls = [lambda: None, lambda: None]
    assert tune_bench.graph_seconds(calls) == pytest.approx(call_ms / 1e3)
    assert captured == ([1] if passes == 1 else [1, passes])


@pytest.mark.parametrize(
    ("size", "free", "copies"), [(30, 10_000, 4), (1, 10_000, 64), (300, 900, 1), (300, 9000, 2)]
)
def test_inputs_do_not_fit_the_cache(
    size: int, free: int, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.device] = []
    case = Case("one", lambda device: {"x": made.append(device)})
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: len(made) * size)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50))
    assert len(tune_bench._inputs(case, torch.device("cuda", 0))) == len(made) == copies
