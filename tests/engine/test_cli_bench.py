"""`halimede bench`: what it runs and counts; how fast is not tested."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_tiny_checkpoint
from typer.testing import CliRunner

from halimede.engine.cli.bench import app
from halimede.engine.cli.bench_startup import STAGES
from halimede.errors import ConfigError, RequestError

ENGINE = ("--max-model-len", "128", "--dtype", "float32", "--kv-cache-memory-bytes", "4000000")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("m"), tokenizer=True)


def bench(tmp_path: Path, command: str, checkpoint: Path, *options: object) -> tuple[dict[str, Any], str]:
    """The written JSON and what was printed."""
    out = tmp_path / "numbers.json"
    arguments = [command, checkpoint, *ENGINE, "--output-json", out, *options]
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(out.read_text()), done.stdout


def test_throughput_counts_every_token_that_was_asked_for(tmp_path: Path, checkpoint: Path) -> None:
    sizes = ("--input-len", 11, "--output-len", 5, "--num-prompts", 7)
    written, printed = bench(tmp_path, "throughput", checkpoint, *sizes)
    results = written["results"]
    assert results["num_requests"] == 7
    assert results["num_prompt_tokens"] == 7 * 11
    assert results["num_output_tokens"] == 7 * 5
    assert results["total_num_tokens"] == 7 * 16
    assert results["tokens_per_second"] == pytest.approx(7 * 16 / results["elapsed_time"])
    assert results["requests_per_second"] == pytest.approx(7 / results["elapsed_time"])
    assert results["output_tokens_per_second"] == pytest.approx(35 / results["elapsed_time"])
    assert 0 < results["ttft_s"]["p50"] <= results["e2el_s"]["p50"] <= results["elapsed_time"]
    assert results["e2el_s"]["p10"] <= results["e2el_s"]["p99"]
    assert "7 requests, 77 prompt and 35 output tokens" in printed
    assert written["engine"]["max_model_len"] == 128


def test_latency_times_the_batches_after_the_warm_up(tmp_path: Path, checkpoint: Path) -> None:
    sizes = ("--input-len", 8, "--output-len", 4, "--batch-size", 3)
    iterations = ("--num-iters-warmup", 1, "--num-iters", 2, "--disable-detokenize")
    written, printed = bench(tmp_path, "latency", checkpoint, *sizes, *iterations)
    results = written["results"]
    assert len(results["latencies"]) == 2
    assert results["avg_latency"] == pytest.approx(sum(results["latencies"]) / 2)
    assert min(results["latencies"]) <= results["percentiles"]["p50"] <= max(results["latencies"])
    assert results["output_tokens_per_second"] == pytest.approx(12 / results["avg_latency"])
    assert "2 batches of 3 x (8 + 4) tokens" in printed


def test_startup_takes_a_process_apart(tmp_path: Path, checkpoint: Path) -> None:
    written, printed = bench(tmp_path, "startup", checkpoint, "--num-iters-cold", 1)
    (process,) = written["results"]["processes"]
    assert set(process) == {*STAGES, "total"}
    assert all(process[stage] > 0 for stage in STAGES)
    assert process["total"] == pytest.approx(sum(process[stage] for stage in STAGES))
    assert all(stage.replace("_", " ") in printed for stage in STAGES)


def test_startup_says_what_the_process_died_of(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["startup", str(tmp_path / "nowhere")])
    assert done.exit_code != 0
    assert "nowhere" in str(done.exception)


def test_a_dummy_model_needs_its_config_only(tmp_path: Path, checkpoint: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    sizes = ("--input-len", 4, "--output-len", 2, "--num-prompts", 2, "--load-format", "dummy")
    written, _ = bench(tmp_path, "throughput", bare, *sizes)
    assert written["results"]["num_output_tokens"] == 4


def test_a_dataset_brings_its_own_prompts_and_lengths(tmp_path: Path, checkpoint: Path) -> None:
    lines = [
        {"custom_id": "a", "body": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}},
        {"custom_id": "b", "body": {"prompt": "Once upon a time", "max_completion_tokens": 4}},
        {"prompt": "far too long " * 200, "max_tokens": 1},
        {"prompt": "Count from one to ten", "max_tokens": 2},
    ]
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    written, _ = bench(tmp_path, "throughput", checkpoint, "--dataset-path", path)
    assert written["results"]["num_requests"] == 3, "what does not fit max_model_len is left out"
    assert written["results"]["num_output_tokens"] == 3 + 4 + 2
    written, _ = bench(tmp_path, "throughput", checkpoint, "--dataset-path", path, "--output-len", 6)
    assert written["results"]["num_output_tokens"] == 3 * 6
    written, _ = bench(tmp_path, "throughput", checkpoint, "--dataset-path", path, "--num-prompts", 1)
    assert written["results"]["num_output_tokens"] == 3


def test_sharegpt_answers_give_the_lengths(tmp_path: Path, checkpoint: Path) -> None:
    talk = [{"from": "human", "value": "Write a short story"}, {"from": "gpt", "value": "Once upon"}]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([{"conversations": talk[:1]}, {"conversations": talk}]))
    written, _ = bench(tmp_path, "throughput", checkpoint, "--dataset-path", path)
    assert written["results"]["num_requests"] == 1
    assert 1 <= written["results"]["num_output_tokens"] <= 10


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{broken", "cannot be read"),
        ('{"text": 1}', "none of messages, prompt"),
        ("", "no request that fits"),
    ],
)
def test_a_dataset_that_is_none(tmp_path: Path, checkpoint: Path, content: str, words: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(RequestError, match=words):
        bench(tmp_path, "throughput", checkpoint, "--dataset-path", path)


def test_what_does_not_fit_is_told(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(RequestError, match="--input-len"):
        bench(tmp_path, "latency", checkpoint, "--input-len", 100, "--output-len", 100)
    with pytest.raises(ConfigError, match="block_size"):
        bench(tmp_path, "startup", checkpoint, "--block-size", 20)
