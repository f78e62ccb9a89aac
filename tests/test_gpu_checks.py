"""scripts/gpu_check.sh: every stage runs on tiny shapes without a GPU; what its modules compute is right."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
HAS_PLOTS = importlib.util.find_spec("matplotlib") is not None


@pytest.fixture(autouse=True)
def _modules(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (BENCHMARKS, BENCHMARKS / "gpu"):
        monkeypatch.syspath_prepend(str(folder))


def test_the_gpu_checks_run_without_a_gpu(tmp_path: Path) -> None:
    """Every stage on tiny shapes, kernels interpreted: that they work, not what they find."""
    from rehearsal import REHEARSAL

    run = subprocess.run(
        ["bash", "scripts/gpu_check.sh", str(tmp_path), "--cpu-rehearsal"],
        cwd=BENCHMARKS.parent,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    names = [stage["name"] for stage in report["stages"]]
    assert len(names) == 11
    for name in names:
        assert report[name]["failures"] == [], name
        assert report[name] == json.loads((tmp_path / f"{name}.json").read_text())
        assert report[name]["rehearsal"] == REHEARSAL
        assert (tmp_path / f"{name}.txt").read_text().startswith(REHEARSAL)
    assert REHEARSAL in (tmp_path / "report.md").read_text()
    for plot in ("decode.png", "kernels.png"):
        assert (tmp_path / plot).exists() == HAS_PLOTS
    assert run.stdout.rstrip().splitlines()[-1].startswith("  1,024 in, 1,024 out")

    measured, skipped = report["serving"]["rows"][:-1], report["serving"]["rows"][-1]
    assert [(row["batch"], row["context"]) for row in measured] == [(2, 8), (1, 8)]
    assert "blocks" in skipped["skipped"]
    profile = measured[0]["profile"]
    assert profile["host_gap_from"] == "kernels"
    assert sum(group["us_per_step"] for group in profile["groups"]) > 0
    assert report["throughput"]["result"]["output_tokens"] == 6
    assert report["throughput"]["result"]["finished"] == 3
    products = report["quantized_products"]["rows"]
    assert {row["kind"] for row in products} == {"int4", "fp8", "int8", "fp8 block"}
    assert all({"bfloat16", "x"} <= row["us"].keys() for row in products)
    assert all(0 < row["errors"]["x: rms"] < 0.02 for row in products)
    served = report["serving_quantized"]["methods"]["int4"]
    assert (served["quantization"], [row["batch"] for row in served["rows"]]) == ("int4", [1])
    assert {"copy", "read"} <= {name.split("_")[0] for name in report["ceilings"]}


def test_a_gpu_is_asked_for_unless_it_is_a_rehearsal(tmp_path: Path) -> None:
    command = ["bash", "scripts/gpu_check.sh", str(tmp_path)]
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=BENCHMARKS.parent, env=environment, capture_output=True, text=True)
    assert (run.returncode, list(tmp_path.iterdir())) == (2, [])
    assert "--cpu-rehearsal" in run.stderr


def test_a_stage_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    from run_stages import TIMED_OUT, run_process

    hangs = (
        "import signal, subprocess, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(subprocess.Popen(['sleep', '300']).pid, flush=True)\n"
        "time.sleep(300)\n"
    )
    log = tmp_path / "log.txt"
    assert run_process([sys.executable, "-c", hangs], log, 1.0, os.environ, kill_after_s=0.5) == TIMED_OUT
    child, stopped = log.read_text().splitlines()
    assert stopped.startswith("stopped after 1 s")
    deadline = time.monotonic() + 10  # it has been killed, and may not have got round to it
    while _is_alive(int(child)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert run_process([sys.executable, "-c", "print('x'); exit(3)"], log, 60.0, os.environ) == 3
    assert log.read_text() == "x\n"


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_stages_leave_time_to_the_later_ones() -> None:
    from run_stages import MINUTES, STAGES, limit_of

    elapsed = 0.0
    for index, stage in enumerate(STAGES):
        limit = limit_of(index, elapsed)
        assert stage.least_s <= limit <= stage.limit_s
        elapsed += limit  # each takes all it may
    assert elapsed <= 60 * MINUTES < 8 * 60
    few = [s for s in STAGES if s.name in ("parity", "quantized_products", "serving_quantized", "report")]
    assert sum(stage.limit_s for stage in few) <= 300
    assert limit_of(0, 0.0, few, 120.0) == 120 - sum(stage.least_s for stage in few[1:])


def test_what_fails_is_written_down_and_leaves_the_rest_alone(tmp_path: Path) -> None:
    from report_tables import stage_rows
    from stage import Results

    results = Results(tmp_path / "x.json", torch.device("cpu"))
    assert results.status == 0
    with results.attempt("the first"):
        raise ValueError("it broke\nin detail")
    results.put("second", 2)
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["failures"] == [{"what": "the first", "error": "ValueError: it broke\nin detail"}]
    assert (written["second"], results.status) == (2, 1)
    stages = [
        {"name": n, "status": s, "seconds": 1.0, "limit_s": 9.0} for n, s in (("x", 1), ("y", 124), ("z", 1))
    ]
    states = [row[1] for row in stage_rows(stages, {"x": written})]
    assert states == ["1 failures", "stopped after 9 s; what it had is below", "exit status 1"]


def test_the_roofline_of_llama_3_8b() -> None:
    from geometry import choose_geometry, load_geometry
    from roofline import AIMS, aimed_share, decode_share, meets

    geometry = load_geometry("llama-3-8b")
    assert geometry.kv_bytes_per_token == 131_072
    assert geometry.streamed_bytes == pytest.approx(15.01e9, rel=1e-3)
    assert geometry.weight_bytes == pytest.approx(16.06e9, rel=1e-3)
    assert load_geometry("llama-3.2-1b").weight_bytes == pytest.approx(2.47e9, rel=2e-3)
    # At 4.3 TB/s; the figures are those of a separate calculation.
    for batch, context, least in ((1, 1024, 3.52), (32, 1024, 4.49), (256, 1024, 11.48), (32, 8192, 11.48)):
        found = decode_share(geometry, batch, context, 2 * least, 4.3e12)
        assert found["roofline_ms"] == pytest.approx(least, abs=0.01)
        assert found["share"] == pytest.approx(0.5, abs=0.002)
        assert found["roofline_tok_s"] == pytest.approx(batch / least * 1e3, rel=2e-3)
    assert choose_geometry("llama-3-8b", 24 << 30) == (geometry, None)
    smaller, note = choose_geometry("llama-3-8b", 16 << 30)
    assert smaller.name == "llama-3.2-1b"
    assert note is not None
    with pytest.raises(SystemExit, match="more than this GPU has"):
        choose_geometry("llama-3.2-1b", 2 << 30)
    assert meets("decode, batch 1, context 1024", 241) > meets("decode, batch 1, context 1024", 240)
    assert meets("host gap, batch 1, context 1024", 0.3) > meets("host gap, batch 1, context 1024", 0.31)
    quantized = decode_share(geometry, 1, 1024, 2.0, 3e12, weight_bytes=4 * 10**9)
    assert quantized["roofline_ms"] == pytest.approx((4e9 + 1024 * 131_072) / 3e9)
    # 4.13 GB of a step at 4.3 TB/s: 1,040 tok/s at most.
    name = "int4: decode, batch 1, context 1024"
    assert aimed_share(name, quantized, 3e12) == pytest.approx(AIMS[name][0] / 1040.3, rel=1e-3)
    assert aimed_share("int4: decode, batch 2, context 1024", quantized, 3e12) is None
    assert len(AIMS) == 8


def test_a_trace_gives_idle_time_between_steps_whose_launches_overlap(tmp_path: Path) -> None:
    from gpu_trace import STEP, busy_us, by_group, gaps_us, read_trace, steps_of

    def event(category: str, name: str, start: float, duration: float, correlation: int | None = None) -> Any:
        args = {} if correlation is None else {"correlation": correlation}
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "args": args}

    events = [
        event("user_annotation", STEP, 0, 10),
        event("user_annotation", STEP, 20, 10),
        event("user_annotation", STEP, 40, 10),
        event("gpu_user_annotation", STEP, 5, 90),  # no work of the GPU
        event("cuda_driver", "cuLaunchKernel", 1, 1, 1),
        event("cuda_runtime", "cudaGraphLaunch", 21, 1, 2),
        event("cuda_runtime", "cudaGraphLaunch", 41, 1, 3),
        event("kernel", "_rms_norm_kernel", 5, 5, 1),
        event("kernel", "nvjet_tst_64x8", 8, 12, 1),  # overlaps the norm by 2, ends after step 2 was launched
        event("gpu_memcpy", "Memcpy DtoH", 28, 2, 2),
        event("kernel", "_attention_decode_kernel", 24, 3, 2),
        event("kernel", "_draw_kernel", 29, 4, 3),  # starts before the step before it ends
        event("kernel", "_draw_kernel", 70, 1),  # launched before the profile began
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    activities = read_trace(path, gpu=True)
    assert [a.step for a in activities] == [0, 0, 1, 1, 2, None]
    assert gaps_us(steps_of(activities)) == [4, 0]
    assert busy_us(activities) == 15 + 3 + 5 + 1
    rows = {row["group"]: row for row in by_group(activities, num_steps=2, num_layers=4)}
    assert rows["sampling"]["us_per_step"] == 2.5
    assert rows["sampling"]["us_per_layer"] == 2.5 / 4
    assert rows["matrix products"]["us_per_step"] == 6
    assert set(rows) == {"norms", "matrix products", "attention", "copies", "sampling"}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("_attention_decode_plan_kernel", "attention"),
        ("_prefill_kernel", "attention"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90>", "attention"),
        ("_gated_matmul_kernel", "gated projection"),
        ("_wna16_matmul_kernel", "quantized products"),
        ("_scaled_matmul_kernel", "quantized products"),
        ("_quantize_kernel", "activation"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matrix products"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "matrix products"),
        ("Cijk_Alik_Bljk_BBS_BH_MT128x128x64", "matrix products"),
        ("_qk_norm_rotary_kv_write_kernel", "rotary, KV write"),
        ("_rms_norm_quant_kernel", "norms"),
        ("_activate_kernel", "activation"),
        ("_embed_kernel", "embedding"),
        ("_threshold_kernel", "sampling"),
        ("Memset (Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4>", "torch's small kernels"),
        ("something_else", "other"),
    ],
)
def test_kernels_are_grouped_by_what_they_are_for(name: str, group: str) -> None:
    from gpu_trace import group_of

    assert group_of(name) == group


def test_only_near_ties_may_be_decided_differently() -> None:
    from near_ties import Choices, gaps, judge, right_in_bfloat16, right_with_narrow_cache

    logits = torch.randn(10, 500, generator=torch.Generator().manual_seed(0))
    best = logits.argmax(1).tolist()
    assert judge([gaps(logits, best)]) == Choices(0.0, 1.0)
    tied = logits.clone()
    tied[3, 7] = tied[3].max() - 0.05
    choices = judge([gaps(tied[:5], [*best[:3], 7, best[4]]), gaps(tied[5:], best[5:])])
    assert choices.largest == pytest.approx(0.9)
    assert choices.gap == pytest.approx(0.05, rel=0.1)
    assert right_in_bfloat16(choices)
    tied[3, 7] -= 0.1
    assert not right_in_bfloat16(judge([gaps(tied, [*best[:3], 7, *best[4:]])]))
    assert not right_in_bfloat16(judge([gaps(logits, [(token + 1) % 500 for token in best])]))
    assert not right_in_bfloat16(Choices(gap=0.05, largest=0.7))
    assert right_with_narrow_cache(Choices(0.4, 0.7), "fp8")
    assert not right_with_narrow_cache(Choices(0.4, 0.7), "int8")
    assert not right_with_narrow_cache(Choices(0.4, 0.5), "fp8")


def test_the_steady_part_leaves_filling_and_emptying_out() -> None:
    from throughput import Step, inter_token_ms, steady_rate

    steps = [Step(1, 0), Step(2, 3), Step(3, 10), Step(4, 9), Step(7, 2), Step(8, 10), Step(9, 4)]
    assert steady_rate(steps, 10) == (9 + 2 + 10) / 5
    assert steady_rate(steps[:3], 10) is None
    assert inter_token_ms(steps)["p50"] == 1000
    assert inter_token_ms(steps)["p99"] == 3000


def test_aims_are_held_against_the_model_that_they_are_for() -> None:
    from report_tables import measured

    row = {"batch": 1, "context": 1024, "tok_s": 250.0, "profile": {"host_gap_ms": 0.1}}
    skipped = {"batch": 32, "context": 1024, "skipped": "too large"}
    serving = {"geometry": "llama-3-8b", "rows": [row, skipped]}
    assert measured({"serving": serving}) == {
        "decode, batch 1, context 1024": 250.0,
        "host gap, batch 1, context 1024": 0.1,
    }
    assert measured({"serving": {**serving, "geometry": "llama-3.2-1b"}}) == {}
    methods = {"fp8": {"rows": [{**row, "tok_s": 430.0}, skipped]}, "int8": {"rows": [row]}}
    quantized = {"geometry": "llama-3-8b", "methods": methods}
    assert measured({"serving_quantized": quantized}) == {"fp8: decode, batch 1, context 1024": 430.0}
