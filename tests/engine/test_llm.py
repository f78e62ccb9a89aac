"""The offline front end on a tiny checkpoint: what vLLM's users expect of LLM, generate and chat."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import greedy_reference, write_tiny_checkpoint

from halimede import LLM, RequestError, RequestOutputKind, SamplingParams
from halimede.engine.outputs import RequestOutput

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["hello world", "the quick brown fox jumps", "a"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM", tokenizer=True)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(checkpoint), dtype="float32", max_model_len=128, kv_cache_memory_bytes=1 << 22) as llm:
        yield llm


def ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(o.outputs[0].token_ids) for o in outputs]


def test_greedy_tokens_are_those_of_transformers(llm: LLM, checkpoint: Path) -> None:
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    expected = [greedy_reference(checkpoint, llm.get_tokenizer().encode(p), 12) for p in PROMPTS]
    assert ids(outputs) == expected
    assert len({tuple(e) for e in expected}) == len(PROMPTS)


def test_results_have_vllms_fields_in_the_order_of_the_prompts(llm: LLM) -> None:
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.prompt == prompt
        assert output.prompt_token_ids == llm.get_tokenizer().encode(prompt)
        assert output.finished
        assert output.error is None
        completion = output.outputs[0]
        assert (completion.index, completion.finish_reason, completion.stop_reason) == (0, "length", None)
        assert completion.finished()
        assert completion.logprobs is None
        assert completion.cumulative_logprob is None
        assert output.metrics is not None
        assert output.metrics.arrival_time <= (output.metrics.first_token_time or 0)


def test_every_form_of_a_prompt_gives_the_same(llm: LLM) -> None:
    token_ids = llm.get_tokenizer().encode(PROMPTS[1])
    forms = [PROMPTS[1], {"prompt": PROMPTS[1]}, {"prompt_token_ids": token_ids}, token_ids]
    outputs = llm.generate(forms, GREEDY, use_tqdm=False)
    assert len({tuple(i) for i in ids(outputs)}) == 1
    assert [o.prompt for o in outputs] == [PROMPTS[1], PROMPTS[1], None, None]
    for single in (PROMPTS[1], token_ids, {"prompt_token_ids": token_ids}):
        assert ids(llm.generate(single, GREEDY, use_tqdm=False)) == ids(outputs[:1])


def test_one_parameter_set_per_prompt(llm: LLM) -> None:
    params = [GREEDY.replace(max_tokens=n) for n in (1, 5, 3)]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [len(i) for i in ids(outputs)] == [1, 5, 3]
    with pytest.raises(RequestError, match="2 sampling_params for 3 prompts"):
        llm.generate(PROMPTS, params[:2], use_tqdm=False)


def test_a_stop_token_and_a_stop_string_end_a_completion(llm: LLM) -> None:
    full = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0].outputs[0]
    token = full.token_ids[4]
    first = list(full.token_ids).index(token)
    by_token = llm.generate(PROMPTS[0], GREEDY.replace(stop_token_ids=[token]), use_tqdm=False)[0].outputs[0]
    assert by_token.token_ids == full.token_ids[: first + 1]
    assert (by_token.finish_reason, by_token.stop_reason) == ("stop", token)
    assert full.text.startswith(by_token.text)
    piece = full.text[len(full.text) // 2 :][:3]
    by_text = llm.generate(PROMPTS[0], GREEDY.replace(stop=piece), use_tqdm=False)[0].outputs[0]
    assert by_text.text == full.text[: full.text.index(piece)]
    assert (by_text.finish_reason, by_text.stop_reason) == ("stop", piece)
    kept = GREEDY.replace(stop=[piece], include_stop_str_in_output=True)
    assert llm.generate(PROMPTS[0], kept, use_tqdm=False)[0].outputs[0].text == by_text.text + piece


def test_logprobs_of_output_and_prompt(llm: LLM) -> None:
    params = GREEDY.replace(logprobs=3, prompt_logprobs=2, max_tokens=4)
    output = llm.generate(PROMPTS[1], params, use_tqdm=False)[0]
    completion = output.outputs[0]
    assert completion.logprobs is not None
    assert len(completion.logprobs) == 4
    total = 0.0
    for token, position in zip(completion.token_ids, completion.logprobs, strict=True):
        assert len(position) == 3
        assert position[token].rank == 1
        assert sorted((p.rank or 0) for p in position.values()) == [1, 2, 3]
        assert position[token].decoded_token == llm.get_tokenizer().decode([token])
        total += position[token].logprob
    assert completion.cumulative_logprob == pytest.approx(total)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids or ())
    for token, at in zip((output.prompt_token_ids or ())[1:], output.prompt_logprobs[1:], strict=True):
        assert at is not None
        assert token in at


def test_n_completions_differ_and_are_reproducible(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=8, temperature=1.5, ignore_eos=True)
    first, second = (llm.generate(PROMPTS, params, use_tqdm=False) for _ in range(2))
    assert [[c.token_ids for c in o.outputs] for o in first] == [
        [c.token_ids for c in o.outputs] for o in second
    ]
    assert [c.index for c in first[0].outputs] == [0, 1, 2]
    assert len({tuple(c.token_ids) for c in first[0].outputs}) == 3
    alone = llm.generate(PROMPTS[1], params, use_tqdm=False)[0]
    assert [c.token_ids for c in alone.outputs] == [c.token_ids for c in first[1].outputs]


def test_the_second_run_reads_the_prefix_cache(llm: LLM) -> None:
    prompt = {"prompt_token_ids": list(range(5, 75))}
    assert llm.reset_prefix_cache()
    cold, warm = (llm.generate(prompt, GREEDY, use_tqdm=False)[0] for _ in range(2))
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, 64)
    assert cold.outputs[0].token_ids == warm.outputs[0].token_ids
    salted = llm.generate({**prompt, "cache_salt": "s"}, GREEDY, use_tqdm=False)[0]
    assert salted.num_cached_tokens == 0


def test_a_stream_adds_up_to_the_whole(llm: LLM) -> None:
    whole = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0].outputs[0]
    delta = list(llm.stream(PROMPTS[0], GREEDY.replace(output_kind=RequestOutputKind.DELTA)))
    assert "".join(c.text for o in delta for c in o.outputs) == whole.text
    assert [t for o in delta for c in o.outputs for t in c.token_ids] == list(whole.token_ids)
    assert [o.finished for o in delta] == [False] * (len(delta) - 1) + [True]
    cumulative = list(llm.stream(PROMPTS[0], GREEDY))
    assert cumulative[-1].outputs[0].text == whole.text
    assert all(whole.text.startswith(o.outputs[0].text) for o in cumulative)
    final = list(llm.stream(PROMPTS[0], GREEDY.replace(output_kind=RequestOutputKind.FINAL_ONLY)))
    assert [o.outputs[0].text for o in final] == [whole.text]


def test_a_stream_may_pause_for_other_work_or_be_left(llm: LLM) -> None:
    expected = ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    stream = llm.stream(PROMPTS[0], GREEDY)
    next(stream)
    assert ids(llm.generate(PROMPTS[1:], GREEDY, use_tqdm=False)) == expected[1:]
    assert list(list(stream)[-1].outputs[0].token_ids) == expected[0]
    left = llm.stream(PROMPTS[0], GREEDY)
    next(left)
    left.close()
    assert ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
    assert not llm._core.has_unfinished


def test_chat_renders_the_template_and_takes_lists(llm: LLM, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "hi"}]
    one = llm.chat(talk, GREEDY, use_tqdm=False)
    two = llm.chat(
        [talk, [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]], GREEDY, use_tqdm=False
    )
    assert len(one) == 1
    assert ids(two) == ids(one) * 2
    assert one[0].prompt == llm.render_chat(talk)
    assert one[0].prompt_token_ids == llm.get_tokenizer().apply_chat_template(
        talk, add_generation_prompt=True, return_dict=False
    )
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages[0]['content'] }}?")
    assert llm.chat(talk, GREEDY, use_tqdm=False, chat_template=str(file))[0].prompt == "hi?"
    with pytest.raises(RequestError, match="neither a Jinja template"):
        llm.chat(talk, GREEDY, use_tqdm=False, chat_template="default")
    named = llm.chat(talk, GREEDY, use_tqdm=False, chat_template="{{ messages[0]['content'] }}!")
    assert named[0].prompt == "hi!"


def test_an_empty_list_gives_an_empty_list(llm: LLM) -> None:
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_defaults_come_from_generation_config(checkpoint: Path, tmp_path: Path, llm: LLM) -> None:
    import json
    import shutil

    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "generation_config.json").write_text(
        json.dumps({"temperature": 0.3, "top_k": 7, "eos_token_id": [3, 4]})
    )
    options = {"dtype": "float32", "max_model_len": 64, "kv_cache_memory_bytes": 1 << 21}
    with LLM(str(copy), **options) as recommended:
        changed = recommended.get_default_sampling_params()
        changed.max_tokens = 3  # as scripts written for vLLM do
        assert len(recommended.generate(PROMPTS[0], changed, use_tqdm=False)[0].outputs[0].token_ids) <= 3
        changed.temperature = -1
        with pytest.raises(RequestError, match="temperature=-1"):
            recommended.generate(PROMPTS[0], changed)
        defaults = recommended.get_default_sampling_params()
        assert (defaults.temperature, defaults.top_k) == (0.3, 7)
        assert {3, 4} <= recommended._inputs._eos_token_ids
    with LLM(str(copy), generation_config="vllm", **options) as plain:
        assert plain.get_default_sampling_params() == SamplingParams()


def test_without_a_tokenizer_token_ids_go_in_and_out(checkpoint: Path, llm: LLM) -> None:
    prompt = {"prompt_token_ids": llm.get_tokenizer().encode(PROMPTS[0])}
    options = {"dtype": "float32", "max_model_len": 64, "kv_cache_memory_bytes": 1 << 21}
    with LLM(str(checkpoint), skip_tokenizer_init=True, **options) as bare:
        output = bare.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0]
        assert list(output.token_ids) == ids(llm.generate(prompt, GREEDY, use_tqdm=False))[0]
        assert output.text == ""
        with pytest.raises(RequestError, match="no tokenizer"):
            bare.generate("text", GREEDY)
        with pytest.raises(RequestError, match="stop and bad_words need a tokenizer"):
            bare.generate(prompt, GREEDY.replace(stop="x"))
