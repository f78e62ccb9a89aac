"""Batches without a model: every kind of line, resuming from every kind of results file, flat memory."""

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_tiny_checkpoint

import halimede.engine.build
from halimede import LLM
from halimede.engine.batch.progress import BatchProgress
from halimede.engine.batch.results import ResultsFile
from halimede.engine.batch.run import Batch, BatchSummary, run_batch
from halimede.engine.executor.fake import FakeExecutor
from halimede.errors import BatchError
from halimede.scheduler.output import SchedulerOutput

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
TALK = [{"role": "user", "content": "hi"}]


class Executor(FakeExecutor):
    """Forgets its steps, and fails one when it is told to."""

    fails = False

    def launch(self, output: SchedulerOutput) -> None:
        if Executor.fails:
            Executor.fails = False
            raise RuntimeError("lost its mind")
        self.steps.clear()
        super().launch(output)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("m"), "LlamaForCausalLM", tokenizer=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halimede.engine.build, "LocalExecutor", lambda *_: Executor(300, 512, 64))
        with LLM(str(path), max_num_seqs=4) as llm:
            yield llm


def line(custom_id: Any, url: str = COMPLETION, **body: Any) -> dict[str, Any]:
    needed: dict[str, Any] = {"messages": TALK} if url == CHAT else {"prompt": "hi"}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": needed | {"max_tokens": 3} | body}


def write(path: Path, lines: list[Any]) -> Path:
    encoded = [entry if isinstance(entry, bytes) else json.dumps(entry).encode() for entry in lines]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


class Files:
    """An input file and where its results go."""

    def __init__(self, folder: Path, llm: LLM) -> None:
        self.input, self.output, self._llm = folder / "in.jsonl", folder / "out.jsonl", llm

    def run(self, lines: list[Any], **options: Any) -> tuple[list[dict[str, Any]], BatchSummary]:
        write(self.input, lines)
        summary = run_batch(self._llm, self.input, self.output, show_progress=False, **options)
        return read(self.output), summary


@pytest.fixture
def files(tmp_path: Path, llm: LLM) -> Files:
    return Files(tmp_path, llm)


def test_results_have_openais_shape(files: Files) -> None:
    prompt = [5] * 40
    lines = [line("a", CHAT), line("b", prompt=prompt), line("c", prompt=["x", prompt and "y"], n=2)]
    results, summary = files.run(lines)
    assert [sorted(result) for result in results] == [["custom_id", "error", "id", "response"]] * 3
    assert len({result["id"] for result in results}) == 3
    by_id = {result["custom_id"]: result["response"] for result in results}
    assert all(response["status_code"] == 200 and response["request_id"] for response in by_id.values())
    assert all(result["error"] is None for result in results)
    assert by_id["a"]["body"]["object"] == "chat.completion"
    assert by_id["a"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert by_id["b"]["body"]["usage"]["prompt_tokens"] == 40
    assert [c["index"] for c in by_id["c"]["body"]["choices"]] == [0, 1, 2, 3]
    tokens = sum(r["body"]["usage"]["completion_tokens"] for r in by_id.values())
    assert (summary.num_lines, summary.num_failed, summary.num_resumed) == (3, 0, 0)
    assert summary.output_tokens == tokens
    again, _ = files.run([line("d", prompt=prompt)], overwrite=True)
    assert again[0]["response"]["body"]["usage"]["prompt_tokens_details"]["cached_tokens"] == 32


BAD: list[tuple[Any, str | None, int, str, str]] = [
    (b"nonsense", None, 400, "invalid_json_line", "not valid JSON"),
    (b'{"custom_id": "x", "body": {"temperature": NaN}}', None, 400, "invalid_json_line", "NaN"),
    (b'{"custom_id": "\xff"}', None, 400, "invalid_json_line", "utf-8"),
    (b"[" * 100_000, None, 400, "invalid_json_line", "recursion"),
    (b"[1]", None, 400, "invalid_json_line", "must be an object"),
    ({"url": COMPLETION, "body": {"prompt": "x"}}, None, 400, "missing_required_parameter", "custom_id"),
    (line(7), None, 400, "invalid_type", "custom_id is 7"),
    (line("good"), "good", 400, "duplicate_custom_id", "'good'"),
    (line("x") | {"metod": "POST"}, "x", 400, "unknown_parameter", "'metod'"),
    (line("x") | {"method": "GET"}, "x", 400, "invalid_method", "'GET'"),
    (line("x") | {"url": "/v1/embeddings"}, "x", 400, "invalid_url", "'/v1/embeddings'"),
    (line("x") | {"body": None}, "x", 400, "invalid_type", "body"),
    (line("x", temprature=1), "x", 400, "unknown_parameter", "'temprature'"),
    (line("x", top_p=7), "x", 400, "invalid_value", "top_p=7"),
    (line("x", model="gpt-4o"), "x", 404, "model_not_found", "'gpt-4o'"),
    (line("x", stream=True), "x", 400, "invalid_value", "stream"),
    (line("x", prompt="long " * 100), "x", 400, "null", "max_model_len"),
    (line("x", prompt=["short", "long " * 100]), "x", 400, "null", "max_model_len"),
    (line("x", prompt=[1, 9999]), "x", 400, "null", "9999"),
    (line("x", prompt="\ud800"), "x", 400, "null", "Unicode"),
    (line("x", temperature=1e999), "x", 400, "invalid_json_line", "Infinity"),
    (line("x", logprobs=100), "x", 400, "null", "max_logprobs"),
    (
        line("x", CHAT, messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        "x",
        400,
        "null",
        "image",
    ),
    (line("\ud800", temprature=1), "\ud800", 400, "unknown_parameter", "temprature"),
]


def test_a_bad_line_is_a_result_with_its_error_and_the_others_go_on(files: Files) -> None:
    unique = [
        {**bad, "custom_id": f"x{i}"} if isinstance(bad, dict) and bad.get("custom_id") == "x" else bad
        for i, (bad, *_) in enumerate(BAD)
    ]
    results, summary = files.run([line("good"), *unique, line("good too")])
    assert (summary.num_lines, summary.num_failed) == (len(BAD) + 2, len(BAD))
    errors = {result["error"]["line"]: result for result in results if result["error"]}
    assert sorted(errors) == list(range(2, len(BAD) + 2))
    for number, (_, custom_id, status, code, words) in enumerate(BAD, 2):
        result, error = errors[number], errors[number]["error"]
        if code == "invalid_json_line":
            custom_id = None
        assert result["custom_id"] == (f"x{number - 2}" if custom_id == "x" else custom_id)
        assert str(error["code"] or "null") == code
        assert words in error["message"]
        assert result["response"]["status_code"] == status
        shown = result["response"]["body"]["error"]
        assert shown == {k: error[k] for k in ("message", "param", "code")} | {
            "type": "invalid_request_error"
        }
    assert {r["custom_id"] for r in results if r["error"] is None} == {"good", "good too"}
    # All of them are finished, the ones without an id of their own too.
    again, summary = files.run([line("good"), *unique, line("good too")])
    assert again == results
    assert (summary.num_resumed, summary.num_failed) == (len(BAD) + 2, len(BAD))


def test_a_failure_of_the_engine_is_a_status_of_500(files: Files) -> None:
    Executor.fails = True
    results, summary = files.run([line("a")])
    assert summary.num_failed == 1
    assert results[0]["response"]["status_code"] == 500
    assert results[0]["response"]["body"]["error"]["type"] == "server_error"
    assert "lost its mind" in results[0]["error"]["message"]


def test_blank_lines_and_a_byte_order_mark_are_nothing(files: Files) -> None:
    first = b"\xef\xbb\xbf" + json.dumps(line("a")).encode() + b"\r"
    results, summary = files.run([first, b"", b"  \r", line("b")])
    assert {r["custom_id"] for r in results if r["error"] is None} == {"a", "b"}
    assert summary.num_lines == 2


def test_other_names_of_the_model(files: Files) -> None:
    results, _ = files.run([line("a", model="gpt-4o"), line("b")], served_model_names=["gpt-4o"])
    assert [r["response"]["body"]["model"] for r in results] == ["gpt-4o", "gpt-4o"]


def contents(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What of the results is the same in each run."""
    return {r["custom_id"]: (r["response"]["body"].get("choices"), r["error"]) for r in results}


LINES = [line(f"request {i}", prompt=f"number {i}", temperature=i % 3, n=1 + (i % 3 > 0)) for i in range(12)]


@pytest.mark.parametrize("kept", [0, 1, 5, 11, 12])
@pytest.mark.parametrize("tail", [b"", b'{"i', b'{"id": "batch_req_1", "custom_id": "request 1", "respo'])
def test_a_run_goes_on_where_another_one_stopped(files: Files, kept: int, tail: bytes) -> None:
    whole, _ = files.run(LINES)
    written = files.output.read_bytes().splitlines(keepends=True)
    files.output.write_bytes(b"".join(written[:kept]) + tail)
    resumed, summary = files.run(LINES)
    assert summary.num_resumed == kept
    assert resumed[:kept] == whole[:kept]
    assert sorted(r["custom_id"] for r in resumed) == sorted(entry["custom_id"] for entry in LINES)
    assert contents(resumed) == contents(whole)


def test_a_last_line_without_its_end_counts_if_it_is_whole(files: Files) -> None:
    files.run(LINES)
    written = files.output.read_bytes().splitlines(keepends=True)
    files.output.write_bytes(b"".join(written[:6]).rstrip())
    resumed, summary = files.run(LINES)
    assert summary.num_resumed == 6
    assert len(resumed) == len(LINES)


def test_the_input_may_have_grown_and_changed_its_order(files: Files) -> None:
    before, _ = files.run(LINES[:5])
    after, summary = files.run(LINES[::-1])
    assert summary.num_resumed == 5
    assert after[:5] == before
    assert len(contents(after)) == len(after) == len(LINES)


def test_a_duplicate_that_failed_does_not_stand_in_for_the_line_that_it_repeats(files: Files) -> None:
    lines = [line("a", max_tokens=8), line("b"), line("a")]
    results, _ = files.run(lines)
    failed = next(r for r in results if r["error"])
    files.output.write_text(json.dumps(failed) + "\n")
    resumed, summary = files.run(lines)
    assert summary.num_resumed == 1
    assert sorted((r["custom_id"], r["error"] is None) for r in resumed) == [
        ("a", False),
        ("a", True),
        ("b", True),
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"important notes\n", "line 1"),
        (b"important notes without an end", "line 1"),
        (json.dumps(line("a")).encode() + b"\n", "line 1"),
        (
            b'{"id": "batch_req_1", "custom_id": "z", "response": {"status_code": 200}, "error": null}\n',
            "'z'",
        ),
    ],
)
def test_results_of_something_else_are_left_alone(files: Files, content: bytes, words: str) -> None:
    files.output.write_bytes(content)
    with pytest.raises(BatchError) as caught:
        files.run([line("a")])
    assert words in str(caught.value)
    assert "overwrite" in str(caught.value)
    assert files.output.read_bytes() == content
    results, _ = files.run([line("a")], overwrite=True)
    assert [r["custom_id"] for r in results] == ["a"]


def test_files_that_cannot_be_used(files: Files, tmp_path: Path) -> None:
    with pytest.raises(BatchError, match="cannot be read: No such file"):
        Batch(tmp_path / "nowhere.jsonl", files.output)
    write(files.input, [line("a")])
    with pytest.raises(BatchError, match="is the input as well"):
        Batch(files.input, files.input, overwrite=True)
    with pytest.raises(BatchError, match="No such file"):
        Batch(files.input, tmp_path / "nowhere" / "out.jsonl")
    with pytest.raises(BatchError, match="Is a directory"):
        Batch(files.input, tmp_path)
    with Batch(files.input, files.output), pytest.raises(BatchError, match="another process"):
        Batch(files.input, files.output)
    with pytest.raises(BatchError, match="no requests"):
        files.run([b" "])


def test_a_full_disk_is_told(files: Files, llm: LLM) -> None:
    write(files.input, [line("a")])
    with pytest.raises(BatchError, match="No space left"):
        run_batch(llm, files.input, "/dev/full", show_progress=False)
    assert not llm._core.has_unfinished


def test_memory_is_flat_in_the_length_of_the_input(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    pending = []
    append = ResultsFile.append

    def counted(self: ResultsFile, record: Any) -> None:
        pending.append(len(files._llm._outputs._states))
        append(self, record)

    monkeypatch.setattr(ResultsFile, "append", counted)
    peaks = {}
    for count in (200, 1700):
        write(files.input, [line(f"request {i}", prompt=[i % 512, i // 512, 3] * 15) for i in range(count)])
        tracemalloc.start()
        summary = run_batch(files._llm, files.input, files.output, overwrite=True, show_progress=False)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert summary.num_failed == 0
    assert len(pending) == 1900
    assert max(pending) < 8  # twice max_num_seqs, less the one that has just finished
    # Linear are the ids while the input is looked through (about 100 bytes each), and then a byte per line.
    assert peaks[1700] - peaks[200] < 1500 * 130


def test_without_a_terminal_a_line_now_and_then_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with BatchProgress(10, num_done=2, num_failed=1) as progress:
        for second in (1, 4, 12, 20):
            now = 100.0 + second
            progress.add(failed=second == 4, prompt_tokens=5, output_tokens=30)
    assert capsys.readouterr().err.splitlines() == [
        "5/10 lines (50.0 %), 2 failed, 7.5 tok/s, 0:00:12 gone, 0:00:20 left",
        "6/10 lines (60.0 %), 2 failed, 6.0 tok/s, 0:00:20 gone, 0:00:20 left",
    ]
    with BatchProgress(10, 2, 1, show=False) as progress:
        progress.add(failed=False, prompt_tokens=5, output_tokens=30)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    with BatchProgress(10, num_done=2, num_failed=1) as progress:
        progress.add(failed=False, prompt_tokens=5, output_tokens=30)
    shown = capsys.readouterr().err
    assert all(words in shown for words in ("3/10", "30.0 %", "1 failed", "tok/s", "left"))
