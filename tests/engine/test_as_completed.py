"""Requests from an iterable of any length: fed as there is room, given back as they finish."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import write_tiny_checkpoint

import halimede.engine.build
from halimede import LLM, GenerateRequest, RequestError, SamplingParams
from halimede.engine.executor.fake import FakeExecutor

VOCAB = 512
PLAIN = SamplingParams(max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("m"), "LlamaForCausalLM", tokenizer=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halimede.engine.build, "LocalExecutor", lambda *_: FakeExecutor(200, VOCAB, 64))
        with LLM(str(path), max_num_seqs=4) as llm:
            yield llm


def requests(count: int, **fields: object) -> Iterator[GenerateRequest[int]]:
    for i in range(count):
        prompt = {"prompt_token_ids": [i % VOCAB, 7, i // VOCAB]}
        yield GenerateRequest(prompt, PLAIN.replace(max_tokens=1 + i % 5), i, **fields)  # type: ignore[arg-type]


def test_results_are_those_of_generate(llm: LLM) -> None:
    listed = list(requests(40))
    expected = llm.generate(
        [r.prompt for r in listed],  # type: ignore[misc]
        [r.sampling_params for r in listed],  # type: ignore[misc]
        use_tqdm=False,
    )
    results = dict(llm.as_completed(iter(listed)))
    assert [results[i].outputs for i in range(40)] == [output.outputs for output in expected]
    assert all(output.finished for output in results.values())


def test_they_come_as_they_finish(llm: LLM) -> None:
    order = [key for key, _ in llm.as_completed(requests(4))]
    assert order == [0, 1, 2, 3]
    long_first = [GenerateRequest([1, 2], PLAIN.replace(max_tokens=n), n) for n in (9, 3, 6)]
    assert [key for key, _ in llm.as_completed(long_first)] == [3, 6, 9]


@pytest.mark.parametrize(("max_pending", "window"), [(1, 1), (3, 3), (None, 8)])
def test_the_source_is_read_only_as_there_is_room(llm: LLM, max_pending: int | None, window: int) -> None:
    read, done, most = 0, 0, 0

    def counted() -> Iterator[GenerateRequest[int]]:
        nonlocal read, most
        for request in requests(50):
            read += 1
            most = max(most, read - done)
            assert len(llm._outputs._states) < window
            yield request

    for _ in llm.as_completed(counted(), max_pending=max_pending):
        done += 1
    assert (read, done, most) == (50, 50, window)


def test_bad_requests_are_results_among_the_others(llm: LLM) -> None:
    mixed = [
        GenerateRequest([1, 2], PLAIN, "good"),
        GenerateRequest(RequestError("made of nonsense"), PLAIN, "made badly"),
        GenerateRequest([], PLAIN, "empty"),
        GenerateRequest([1] * 500, PLAIN, "long"),
        GenerateRequest([1, 2], {"max_tokens": 3}, "no parameters"),  # type: ignore[arg-type]
        GenerateRequest([1, 2], None, "defaults"),
    ]
    results = dict(llm.as_completed(mixed, max_pending=1))
    assert set(results) == {r.key for r in mixed}
    errors = {key: str(output.error) for key, output in results.items() if output.error is not None}
    assert set(errors) == {"made badly", "empty", "long", "no parameters"}
    assert errors["made badly"] == "made of nonsense"
    assert "500 tokens" in errors["long"]
    assert "'max_tokens': 3" in errors["no parameters"]
    assert len(results["defaults"].outputs[0].token_ids) <= 16


def test_endless_errors_need_no_room(llm: LLM) -> None:
    def endless() -> Iterator[GenerateRequest[None]]:
        while True:
            yield GenerateRequest("")

    results = llm.as_completed(endless(), max_pending=2)
    assert all("empty" in str(next(results)[1].error) for _ in range(100))
    results.close()  # type: ignore[attr-defined]


def test_leaving_the_loop_aborts_what_runs(llm: LLM) -> None:
    for _ in llm.as_completed(requests(20)):
        assert llm._core.has_unfinished
        break
    assert not llm._core.has_unfinished
    assert not llm._outputs._states

    def broken() -> Iterator[GenerateRequest[int]]:
        yield from requests(3)
        raise OSError("the source broke")

    with pytest.raises(OSError, match="the source broke"):
        list(llm.as_completed(broken()))
    assert not llm._core.has_unfinished


def test_other_calls_may_run_between_results(llm: LLM) -> None:
    expected = {key: output.outputs for key, output in llm.as_completed(requests(12))}
    found = {}
    for key, output in llm.as_completed(requests(12)):
        found[key] = output.outputs
        assert llm.generate([5, 6], PLAIN, use_tqdm=False)[0].finished
    assert found == expected


def test_what_is_no_request_or_no_room(llm: LLM) -> None:
    with pytest.raises(RequestError, match="max_pending=0"):
        llm.as_completed([], max_pending=0)
    with pytest.raises(RequestError, match="request 0 is 'text'"):
        list(llm.as_completed(["text"]))  # type: ignore[list-item]
    assert list(llm.as_completed([])) == []


def test_order_by_priority(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path, "LlamaForCausalLM")
    options = {"kv_cache_memory_bytes": 1 << 21, "max_model_len": 64, "dtype": "float32"}
    with LLM(
        str(path), skip_tokenizer_init=True, scheduling_policy="priority", max_num_seqs=1, **options
    ) as llm:
        mixed = [GenerateRequest([1, 2], PLAIN, p, priority=p) for p in (3, 1, 2)]
        assert [key for key, _ in llm.as_completed(mixed, max_pending=3)] == [1, 2, 3]
