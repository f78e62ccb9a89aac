"""scripts/gpu_check.sh where something dies: what died is named, and the rest has its turn."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

GPU = Path(__file__).parent.parent / "benchmarks" / "gpu"


@pytest.fixture(autouse=True)
def _modules(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (GPU.parent, GPU, GPU.parent.parent / "tests" / "kernels"):
        monkeypatch.syspath_prepend(str(folder))


# Dies of 3, hangs at 5, has lost the GPU after 7.
WORKER = """
import json, os, signal, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    number = int(line)
    if number == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 5:
        time.sleep(100)
    answer = {"error": "illegal address" if number == 7 else None, "seconds": 0.0, "alive": number != 7}
    print(json.dumps({**answer, "process": os.getpid()}), flush=True)
"""


def test_a_process_that_dies_or_hangs_is_replaced_and_its_case_named() -> None:
    from one_by_one import OneByOne

    runner = OneByOne([sys.executable, "-c", WORKER], limit_s=2.0)
    try:
        answers = [runner.run(number) for number in range(9)]
    finally:
        runner.close()
    errors = {number: answer["error"] for number, answer in enumerate(answers) if answer["error"]}
    assert errors.keys() == {3, 5, 7}
    assert "SIGSEGV" in errors[3]
    assert "hung" in errors[5]
    assert errors[7].startswith("illegal address (")
    processes = [answer.get("process") for answer in answers]
    assert len({processes[0], processes[1], processes[2]}) == 1
    assert len({processes[2], processes[4], processes[6], processes[8]}) == 4


def test_a_process_that_cannot_start_is_an_error_at_once() -> None:
    from one_by_one import OneByOne

    runner = OneByOne([sys.executable, "-c", "raise SystemExit(4)"], limit_s=60.0)
    with pytest.raises(RuntimeError, match="ended with status 4"):
        runner.run(0)


def test_a_case_runs_once_its_kernels_are_built() -> None:
    from parity import Schedule

    def outcome(key: str, error: str | None = None) -> Any:
        return SimpleNamespace(specialisation=SimpleNamespace(key=key, name=f"kernel {key}"), error=error)

    def given(schedule: Any) -> list[Any]:
        found = []
        while not schedule.ready.empty():
            found.append(schedule.ready.get())
        return found

    one: Any = None  # only keys are looked at
    schedule = Schedule([{"a": one}, {"a": one, "b": one}, {}, {"c": one}, {"d": one}, {"e": one}])
    schedule.start([SimpleNamespace(key=key) for key in ("a", "b", "c", "e")])  # type: ignore[misc]
    assert given(schedule) == [(2, None), (4, None)]  # the cache has d
    schedule.done(outcome("b"))
    assert given(schedule) == []
    schedule.done(outcome("a"))
    assert given(schedule) == [(0, None), (1, None)]
    schedule.done(outcome("c", "no registers"))
    assert given(schedule) == [(3, "kernel c does not build: no registers")]
    schedule.end()
    assert given(schedule) == [(5, None), None]


def test_a_gpu_that_answers_no_more_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import stage

    results = stage.Results(tmp_path / "x.json", torch.device("cpu"))
    monkeypatch.setattr(stage, "gpu_answers", lambda device: False)
    with pytest.raises(SystemExit) as end, results.attempt("outer"), results.attempt("inner"):
        raise RuntimeError("an illegal memory access was encountered")
    assert end.value.code == stage.CONTEXT_LOST
    written = json.loads((tmp_path / "x.json").read_text())
    assert [failure["what"] for failure in written["failures"]] == ["inner"]
    assert "inner" in written["notes"][0]


def test_products_go_on_after_the_shape_that_a_process_died_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import quantized_products
    from stage import CONTEXT_LOST, Results

    output = tmp_path / "x.json"
    results = Results(output, torch.device("cpu"))
    jobs = [("int4", "qkv"), ("int4", "o"), ("fp8 block", "qkv"), ("fp8 block", "o")]
    asked: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        left = command[command.index("--jobs") + 1 :]
        asked.append(left)
        worker = Results(output, torch.device("cpu"), resume=True)
        for job in (tuple(one.split("/")) for one in left):
            worker.put("job", quantized_products.name_of(job))
            if job == jobs[1]:
                worker.fail("int4, o", "illegal address")
                return SimpleNamespace(returncode=CONTEXT_LOST)
            if job == jobs[2]:
                return SimpleNamespace(returncode=-11)
            worker.add("done", quantized_products.name_of(job))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(quantized_products.subprocess, "run", run)
    quantized_products.supervise(results, jobs, "cpu")
    assert [len(left) for left in asked] == [4, 2, 1]
    assert asked[-1] == ["fp8 block/o"]
    written = json.loads(output.read_text())
    assert written["done"] == ["int4, qkv", "fp8 block, o"]
    assert [failure["what"] for failure in written["failures"]] == ["int4, o", "fp8 block, qkv"]


def test_wrong_products_are_noticed() -> None:
    from product_errors import EXACT, ROUNDED, check_product, compared_rows

    torch.manual_seed(0)
    x, weight = torch.randn(200, 512).double(), torch.randn(96, 512).double() * 512**-0.5
    right = (x @ weight.t()).to(torch.bfloat16)
    found = check_product(lambda: right.clone(), x, weight, EXACT)
    assert 0 < found.rms < 0.003
    rows = compared_rows(200, x.device).tolist()
    assert (rows[0], rows[-1], len(rows)) == (0, 199, 96)

    def changed(where: Any, by: float) -> torch.Tensor:
        y = right.clone()
        y[where] *= by
        return y

    wrong = {
        "one column's scale": changed((slice(None), 5), 1.2),
        "one number": changed((199, 95), float("nan")),
        "a row": changed(0, 0.5),
        "all, a little": changed(slice(None), 1.01),
        "not written": torch.full_like(right, float("nan")),
    }
    for what, y in wrong.items():
        with pytest.raises(AssertionError, match="beyond"):
            check_product(lambda y=y: y, x, weight, EXACT)  # type: ignore[misc]
        assert what
    tail = x[:, :448] @ weight[:, :448].t()  # the last 64 columns left out
    for bounds in ROUNDED.values():
        with pytest.raises(AssertionError, match="beyond"):
            check_product(lambda: tail.to(torch.bfloat16), x, weight, bounds)
    runs = iter((right, changed((0, 0), 1.008)))
    with pytest.raises(AssertionError, match="other bits"):
        check_product(lambda: next(runs), x, weight, EXACT)


def test_forms_of_one_weight_have_memory_of_their_own_and_stand_for_it() -> None:
    from product_errors import ROUNDED, check_product
    from quantized_weights import KINDS, bytes_of, form_of, random_weight

    cpu = torch.device("cpu")
    torch.manual_seed(0)
    x = torch.randn(5, 256).to(torch.bfloat16)
    bits = {"int4": 4, "fp8": 8, "fp8 block": 8, "int8": 8}
    for kind in KINDS:
        weight = random_weight(kind, 128, 256, cpu)
        first, second = form_of(weight, cpu), form_of(weight, cpu)
        addresses = {b.data_ptr() for b in first.buffers()} & {b.data_ptr() for b in second.buffers()}
        assert addresses <= {0}, kind
        values = weight.dequantize().double()
        check_product(lambda form=first: form(x), x.double(), values, ROUNDED[torch.int8])  # type: ignore[misc]
        assert 128 * 256 * bits[kind] / 8 <= bytes_of(first) <= 1.2 * 128 * 256 * bits[kind] / 8
        assert (values.square().mean() * 256).item() == pytest.approx(1, rel=0.05)


def test_a_step_reads_every_weight_but_the_embedding() -> None:
    from engine_steps import streamed_bytes
    from geometry import load_geometry

    from halimede.engine.models.config import ModelConfig
    from halimede.engine.models.registry import build_model

    for name in ("llama-3-8b", "llama-3.2-1b"):  # the second one's embedding is its output layer
        geometry = load_geometry(name)
        model = build_model(ModelConfig.from_hf(geometry.config, "config.json"))
        float32 = 2 * geometry.streamed_bytes
        assert streamed_bytes(model) == pytest.approx(float32, rel=1e-3)
