"""What a user can get wrong in a request: a typed error with fact, value and remedy, and nothing lost."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import write_tiny_checkpoint

from halimede import LLM, ConfigError, EngineDeadError, ModelLoadError, RequestError, SamplingParams
from halimede.engine.executor.base import Executor
from halimede.scheduler.output import ModelRunnerOutput, SchedulerOutput

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
GOOD = {"prompt_token_ids": [5, 6, 7, 8]}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("qwen"), "Qwen2ForCausalLM", tokenizer=True)
    with LLM(str(path), dtype="float32", max_model_len=64, kv_cache_memory_bytes=1 << 22) as llm:
        yield llm


BAD = [
    ("", ["empty", "at least one token"]),
    ({"prompt_token_ids": []}, ["empty"]),
    ({"prompt_token_ids": [1, 10**6]}, ["1000000", "vocabulary"]),
    ({"prompt_token_ids": [1, -1]}, ["-1", "vocabulary"]),
    ({"prompt_token_ids": [1, 2.5]}, ["2.5", "integers"]),
    ({"prompt_token_ids": "12"}, ["'12'", "list of integers"]),
    ({"prompt_token_ids": [1] * 64}, ["64 tokens", "max_model_len is 64", "shorten"]),
    ({"prompt_token_ids": [1] * 500}, ["500 tokens", "max_model_len is 64", "raise"]),
    ({"promt": "x"}, ["'promt'", "prompt_token_ids"]),
    ({}, ["'prompt'", "'prompt_token_ids'"]),
    ({"prompt": 3}, ["3", "string"]),
    ({"prompt": "x", "cache_salt": ""}, ["cache_salt", "non-empty"]),
    ("\ud800", ["Unicode"]),
]


@pytest.mark.parametrize(("prompt", "words"), BAD)
def test_a_bad_prompt_is_told_and_nothing_is_run(llm: LLM, prompt: object, words: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate([GOOD, prompt, GOOD], GREEDY, use_tqdm=False)  # type: ignore[list-item]
    message = str(caught.value)
    assert all(word in message for word in ["prompt 1 of 3", *words])
    assert caught.value.outputs == ()
    assert not llm._core.has_unfinished


def test_on_error_return_gives_the_others_their_results(llm: LLM) -> None:
    expected = llm.generate(GOOD, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    prompts = [p for bad, _ in BAD for p in (bad, GOOD)]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False, on_error="return")
    assert len(outputs) == len(prompts)
    for bad, good in zip(outputs[::2], outputs[1::2], strict=True):
        assert isinstance(bad.error, RequestError)
        assert bad.finished
        assert bad.outputs[0].finish_reason == "error"
        assert good.error is None
        assert good.outputs[0].token_ids == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logit_bias": {10**6: 1.0}}, ["logit_bias", "1000000"]),
        ({"allowed_token_ids": [10**6]}, ["allowed_token_ids", "1000000"]),
        ({"stop_token_ids": [10**6]}, ["stop_token_ids", "1000000"]),
        ({"logprobs": 21}, ["logprobs=21", "max_logprobs=20"]),
        ({"prompt_logprobs": -1}, ["prompt_logprobs=-1", "max_logprobs=20"]),
    ],
)
def test_parameters_that_do_not_fit_the_model(llm: LLM, changes: dict, words: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate(GOOD, GREEDY.replace(**changes), use_tqdm=False)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("messages", "options", "words"),
    [
        ([], {}, ["empty", "at least one message"]),
        ([{"content": "x"}], {}, ["message 0", "role"]),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, ["image_url", "text parts"]),
        ([{"role": "user", "content": "x"}], {"continue_final_message": True}, ["add_generation_prompt"]),
        ([{"role": "user", "content": "x"}], {"chat_template": "{{ raise_exception('no') }}"}, ["no"]),
        ([{"role": "user", "content": "x"}], {"chat_template": "{% if"}, ["chat template"]),
    ],
)
def test_bad_conversations(llm: LLM, messages: list, options: dict, words: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        llm.chat(messages, GREEDY, use_tqdm=False, **options)
    assert all(word in str(caught.value) for word in words)


def test_bad_arguments_of_a_call_leave_the_engine_as_it_was(llm: LLM) -> None:
    changed = GREEDY.clone()
    changed.top_p = 5
    outputs = llm.generate([GOOD, GOOD], [GREEDY, changed], use_tqdm=False, on_error="return")
    assert outputs[0].error is None
    assert "top_p=5" in str(outputs[1].error)
    for arguments in (
        {"sampling_params": [GREEDY, None]},
        {"sampling_params": [GREEDY, {"max_tokens": 3}]},
        {"sampling_params": {"max_tokens": 3}},
        {"sampling_params": []},
        {"sampling_params": GREEDY, "priority": [1, None]},
        {"sampling_params": GREEDY, "priority": "x"},
        {"sampling_params": GREEDY, "priority": [1, 2, 3]},
        {"sampling_params": GREEDY, "on_error": "ignore"},
    ):
        with pytest.raises(RequestError):
            llm.generate([GOOD, GOOD], use_tqdm=False, **arguments)
        assert not llm._core.has_unfinished
        assert not llm._outputs._states
    assert len(llm.generate([GOOD, GOOD], GREEDY, use_tqdm=False)) == 2


def test_words_of_white_space_can_be_bad(llm: LLM) -> None:
    assert llm.generate(GOOD, GREEDY.replace(bad_words=["\n", " "]), use_tqdm=False)[0].finished


def test_a_bad_conversation_does_not_take_the_others_with_it(llm: LLM) -> None:
    good = [{"role": "user", "content": "x"}]
    bad = [{"role": "user", "content": [{"type": "image_url"}]}]
    with pytest.raises(RequestError, match="prompt 1 of 3"):
        llm.chat([good, bad, good], GREEDY, use_tqdm=False)
    first, failed, last = llm.chat([good, bad, good], GREEDY, use_tqdm=False, on_error="return")
    assert "image_url" in str(failed.error)
    assert first.outputs[0].token_ids == last.outputs[0].token_ids
    assert len(first.outputs[0].token_ids) == GREEDY.max_tokens


class FlakyExecutor:
    """Fails on demand: whole steps, or single sequences."""

    def __init__(self, inner: Executor) -> None:
        self.inner, self.raises, self.spoil = inner, None, False
        self.num_blocks, self.max_model_len = inner.num_blocks, inner.max_model_len
        self.kernel_counters, self.max_steps_in_flight = inner.kernel_counters, inner.max_steps_in_flight

    def launch(self, output: SchedulerOutput) -> None:
        if self.raises is not None:
            error, self.raises = self.raises, None
            raise error
        self.inner.launch(output)

    def collect(self) -> ModelRunnerOutput:
        result = self.inner.collect()
        if self.spoil and result.sampled_token_ids:
            self.spoil = False
            seq_id = min(result.sampled_token_ids)
            sampled = {k: v for k, v in result.sampled_token_ids.items() if k != seq_id}
            return ModelRunnerOutput(sampled, errors={seq_id: "its logits are not finite"})
        return result

    def abandon(self) -> None:
        self.inner.abandon()

    def start_profile(self, folder: str) -> None:
        self.inner.start_profile(folder)

    def stop_profile(self) -> str:
        return self.inner.stop_profile()

    def shutdown(self) -> None:
        self.inner.shutdown()


@pytest.fixture
def flaky(llm: LLM) -> Iterator[FlakyExecutor]:
    inner = llm._core._executor
    executor = FlakyExecutor(inner)
    llm._core._executor = executor
    yield executor
    llm._core._executor = inner


def test_a_request_that_fails_while_running_takes_no_other_with_it(llm: LLM, flaky: FlakyExecutor) -> None:
    expected = llm.generate(GOOD, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    flaky.spoil = True
    with pytest.raises(RequestError, match=r"prompt 0 of 3.*not finite") as caught:
        llm.generate([GOOD] * 3, GREEDY, use_tqdm=False)
    first, *others = caught.value.outputs
    assert first is None
    assert all(o.outputs[0].token_ids == expected for o in others)


def test_a_step_that_fails_leaves_the_engine_in_service(
    llm: LLM, flaky: FlakyExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    expected = llm.generate(GOOD, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    llm.reset_prefix_cache()
    flaky.raises = RuntimeError("device lost its mind")
    with pytest.raises(RequestError, match="RuntimeError: device lost its mind"):
        llm.generate(GOOD, GREEDY, use_tqdm=False)
    again = llm.generate(GOOD, GREEDY, use_tqdm=False)[0]
    assert again.outputs[0].token_ids == expected
    assert again.num_cached_tokens == 0


def test_ctrl_c_stops_the_call_and_not_the_engine(llm: LLM, flaky: FlakyExecutor) -> None:
    flaky.raises = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        llm.generate([GOOD] * 3, GREEDY, use_tqdm=False)
    assert not llm._core.has_unfinished
    assert llm.generate(GOOD, GREEDY, use_tqdm=False)[0].finished


def test_bad_options_of_the_engine(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path, "LlamaForCausalLM", tokenizer=True)
    with pytest.raises(ConfigError, match="'max_model_length'; did you mean 'max_model_len'"):
        LLM(str(path), max_model_length=64)
    with pytest.raises(ConfigError, match=r"chat_template='nowhere\.jinja'"):
        LLM(str(path), chat_template="nowhere.jinja")
    for generation_config in ({"top_p": 0}, {"top_k": 5.5}, {"eos_token_id": "2"}, {"eos_token_id": [[2]]}):
        (path / "generation_config.json").write_text(json.dumps(generation_config))
        with pytest.raises(ModelLoadError, match=r"generation_config\.json"):
            LLM(str(path))
    (path / "generation_config.json").unlink()
    for name in ("~nosuchuser/x", "x" * 5000):
        with pytest.raises(ModelLoadError, match="check the path"):
            LLM(name)
    with pytest.raises(ConfigError, match="KV cache"):
        LLM(str(path), max_model_len=128, num_gpu_blocks_override=3)


def test_a_closed_engine_says_so(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path, "LlamaForCausalLM", tokenizer=True)
    llm = LLM(str(path), max_model_len=64, kv_cache_memory_bytes=1 << 21)
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(EngineDeadError, match="shut down"):
        llm.generate(GOOD, GREEDY)
