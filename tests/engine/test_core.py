"""Input processor, core and output processor over an executor without a model: a whole engine in seconds."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from halimede import RequestOutputKind, SamplingParams
from halimede.engine.core import EngineCore
from halimede.engine.executor.fake import FakeExecutor, fake_next_token
from halimede.engine.input_processor import InputLimits, InputProcessor, Prompt
from halimede.engine.loader.gguf_tokenizer import load_gguf_tokenizer
from halimede.engine.output_processor import OutputProcessor
from halimede.engine.outputs import RequestOutput
from halimede.engine.tokenizer import IncrementalDetokenizer
from halimede.scheduler.config import SchedulerConfig
from halimede.scheduler.scheduler import Scheduler

VOCAB, BLOCKS, BLOCK_SIZE, MAX_LEN = 20000, 40, 16, 200
PLAIN = SamplingParams(max_tokens=20, ignore_eos=True)
DELTA = RequestOutputKind.DELTA


class Engine:
    """What every front end does, without the front end."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast | None, max_num_batched_tokens: int = 2048) -> None:
        self.executor = FakeExecutor(BLOCKS, VOCAB, MAX_LEN, BLOCK_SIZE)
        limits = {"max_num_batched_tokens": max_num_batched_tokens, "max_num_seqs": 8}
        scheduler = Scheduler(SchedulerConfig(BLOCKS, BLOCK_SIZE, MAX_LEN, **limits))
        self.core = EngineCore(scheduler, self.executor)
        self.inputs = InputProcessor(tokenizer, frozenset(), InputLimits(VOCAB, MAX_LEN, 20), seed=0)
        self.outputs = OutputProcessor(tokenizer)
        self.count = 0

    def add(self, prompt: Prompt, params: SamplingParams) -> str:
        self.count += 1
        processed = self.inputs.process(f"r{self.count}", prompt, params)
        self.outputs.add(processed)
        for request in processed.requests:
            self.core.add(request)
        return processed.request_id

    def run(self) -> dict[str, list[RequestOutput]]:
        shown: dict[str, list[RequestOutput]] = {}
        while self.core.has_unfinished:
            result = self.outputs.process(self.core.step())
            for request_id in result.to_abort:
                assert self.core.abort(request_id) is not None
            for output in result.outputs:
                shown.setdefault(output.request_id, []).append(output)
        return shown


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf: Path) -> PreTrainedTokenizerFast:
    return load_gguf_tokenizer(smollm2_gguf)


@pytest.fixture
def engine(tokenizer: PreTrainedTokenizerFast) -> Engine:
    return Engine(tokenizer)


def expected_tokens(prompt: list[int], count: int) -> list[int]:
    known = list(prompt)
    for _ in range(count):
        known.append(fake_next_token(known, VOCAB))
    return known[len(prompt) :]


def test_tokens_and_text_of_many_requests_at_once(engine: Engine, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = [list(range(100, 100 + n)) for n in (1, 16, 17, 40, 90, 150)]
    names = [engine.add({"prompt_token_ids": p}, PLAIN) for p in prompts]
    shown = engine.run()
    for name, prompt in zip(names, prompts, strict=True):
        completion = shown[name][-1].outputs[0]
        assert completion.token_ids == expected_tokens(prompt, 20)
        whole = tokenizer.decode(prompt + completion.token_ids)
        assert whole == tokenizer.decode(prompt) + completion.text


def test_a_delta_stream_shows_each_thing_once(engine: Engine) -> None:
    params = PLAIN.replace(n=3, temperature=1.0, output_kind=DELTA, logprobs=1)
    name = engine.add("Once upon a time", params)
    whole = engine.add("Once upon a time", params.replace(output_kind=RequestOutputKind.FINAL_ONLY))
    shown = engine.run()
    (final,) = shown[whole]
    for index in range(3):
        pieces = [c for o in shown[name] for c in o.outputs if c.index == index]
        assert sum(c.finished() for c in pieces) == 1
        assert [t for c in pieces for t in c.token_ids] == final.outputs[index].token_ids
        assert "".join(c.text for c in pieces) == final.outputs[index].text
        assert [p for c in pieces for p in c.logprobs or ()] == final.outputs[index].logprobs
        assert pieces[-1].cumulative_logprob == final.outputs[index].cumulative_logprob


def test_a_stop_string_ends_one_completion_and_not_its_siblings(engine: Engine) -> None:
    free = PLAIN.replace(n=2, temperature=1.0)
    name = engine.add("x", free)
    text = engine.run()[name][-1].outputs[0].text
    stop = text[8:12]
    name = engine.add("x", free.replace(stop=[stop]))
    outputs = engine.run()[name]
    ended = outputs[-1].outputs[0]
    assert (ended.text, ended.finish_reason, ended.stop_reason) == (text[: text.index(stop)], "stop", stop)
    assert outputs[-1].finished
    assert not engine.core.has_unfinished


def test_completions_of_one_prompt_share_it_but_that_is_no_cache_hit(engine: Engine) -> None:
    prompt = list(range(50, 115))
    name = engine.add(prompt, PLAIN.replace(n=3, temperature=1.0))
    assert engine.run()[name][-1].num_cached_tokens == 0
    first = engine.executor.steps[0]
    assert [row.num_tokens for row in first.scheduled] == [65, 1, 1]
    name = engine.add(prompt, PLAIN)
    assert engine.run()[name][-1].num_cached_tokens == 64


def test_min_tokens_hold_stop_strings_back(engine: Engine) -> None:
    name = engine.add("x", PLAIN)
    completion = engine.run()[name][-1].outputs[0]
    stop = completion.text[:2]
    late = engine.add("x", PLAIN.replace(stop=[stop], min_tokens=5))
    output = engine.run()[late][-1].outputs[0]
    assert len(output.token_ids) > 5
    assert output.text.startswith(stop)


def test_a_stream_holds_back_what_may_become_a_stop_string(engine: Engine) -> None:
    name = engine.add("x", PLAIN)
    text = engine.run()[name][-1].outputs[0].text
    stop = text[10:24]
    streamed = engine.add("x", PLAIN.replace(stop=[stop], output_kind=DELTA))
    pieces = [c.text for o in engine.run()[streamed] for c in o.outputs]
    assert "".join(pieces) == text[: text.index(stop)]


def test_without_detokenizing_or_a_tokenizer_the_text_is_empty(engine: Engine) -> None:
    name = engine.add("x", PLAIN.replace(detokenize=False))
    completion = engine.run()[name][-1].outputs[0]
    assert completion.text == ""
    assert len(completion.token_ids) == 20
    bare = Engine(None)
    name = bare.add([5, 6], PLAIN.replace(logprobs=1))
    completion = bare.run()[name][-1].outputs[0]
    assert completion.text == ""
    assert completion.logprobs is not None
    assert completion.logprobs[0][completion.token_ids[0]].decoded_token is None


def test_prompt_logprobs_cover_the_prompt_but_its_first_token(engine: Engine) -> None:
    prompt = list(range(7, 77))
    for _ in range(2):  # the second time the prefix cache would have it all
        name = engine.add({"prompt_token_ids": prompt}, PLAIN.replace(prompt_logprobs=2))
        output = engine.run()[name][-1]
        assert output.prompt_logprobs is not None
        assert [None if p is None else next(iter(p)) for p in output.prompt_logprobs] == [None, *prompt[1:]]
        assert output.num_cached_tokens == 0


def test_prompt_logprobs_of_a_stream_come_once_and_never_without_a_token(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    engine = Engine(tokenizer, max_num_batched_tokens=8)
    prompt = list(range(7, 40))
    name = engine.add(prompt, PLAIN.replace(prompt_logprobs=0, output_kind=DELTA))
    outputs = engine.run()[name]
    assert all(o.outputs[0].token_ids for o in outputs)
    entries = [p for o in outputs for p in o.prompt_logprobs or ()]
    assert [None if p is None else next(iter(p)) for p in entries] == [None, *prompt[1:]]


def test_max_tokens_none_goes_up_to_the_models_length(engine: Engine) -> None:
    name = engine.add([1, 2, 3], PLAIN.replace(max_tokens=None))
    completion = engine.run()[name][-1].outputs[0]
    assert len(completion.token_ids) == MAX_LEN - 3
    assert completion.finish_reason == "length"


def test_updates_of_a_forgotten_request_are_ignored(engine: Engine) -> None:
    name = engine.add([1, 2, 3], PLAIN)
    engine.outputs.process(engine.core.step())
    assert engine.outputs.forget(name) == [name]
    assert engine.outputs.forget(name) == []
    assert engine.outputs.process(engine.core.step()).outputs == []
    assert engine.core.abort(name) is not None
    assert engine.core.abort(name) is None
    assert not engine.core.has_unfinished


def test_what_a_stream_shows_of_a_request_costs_nothing_for_its_length(engine: Engine) -> None:
    name = engine.add({"prompt_token_ids": list(range(150))}, PLAIN.replace(output_kind=DELTA))
    outputs = engine.run()[name]
    assert len({id(output.prompt_token_ids) for output in outputs}) == 1
    assert outputs[-1].prompt_token_ids == list(range(150))
    assert all(len(output.outputs[0].token_ids) == 1 for output in outputs)


def test_a_tokenizer_with_a_way_of_its_own_to_decode_keeps_it(tokenizer: PreTrainedTokenizerFast) -> None:
    class Loud(PreTrainedTokenizerFast):
        def decode(self, *args: Any, **kwargs: Any) -> str:
            return str(super().decode(*args, **kwargs)).upper()

    ids = tokenizer.encode("the moon of Neptune")
    loud = Loud(tokenizer_object=tokenizer.backend_tokenizer)
    plain = IncrementalDetokenizer(tokenizer, [], skip_special_tokens=True)
    assert "".join(map(plain.add, ids)) == "the moon of Neptune"
    stream = IncrementalDetokenizer(loud, [], skip_special_tokens=True)
    assert "".join(map(stream.add, ids)) == "THE MOON OF NEPTUNE"
