"""Ctrl-C at the worst moments: the call ends, the engine and the other requests do not suffer."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tiny_models import write_tiny_checkpoint

from halimede import LLM, RequestError, SamplingParams
from halimede.engine.interrupt import allow_interrupts, defer_interrupts

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPT = {"prompt_token_ids": list(range(10, 50))}


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), defer_interrupts():
        with defer_interrupts():
            press_ctrl_c()
            done.append(1)
        done.append(2)
    assert done == [1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_window_lets_it_through_whenever_it_came() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), defer_interrupts():
        press_ctrl_c()
        done.append(1)
        with allow_interrupts():
            done.append(2)
    assert done == [1]
    with pytest.raises(KeyboardInterrupt), defer_interrupts(), allow_interrupts():
        press_ctrl_c()
        done.append(3)
    assert done == [1]


def test_a_block_inside_the_window_defers_again() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), defer_interrupts(), allow_interrupts():
        with defer_interrupts():
            press_ctrl_c()
            done.append(1)
        done.append(2)
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM")
    with LLM(str(path), skip_tokenizer_init=True, dtype="float32", kv_cache_memory_bytes=1 << 22) as llm:
        yield llm


def once_before(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Press Ctrl-C just before the next call of a method."""
    original: Callable[..., Any] = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(owner, name, original)
        press_ctrl_c()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


PLACES = [
    ("scheduler", "schedule"),
    ("blocks", "take_registrations"),
    ("blocks", "allocate"),
    ("executor", "launch"),
    ("executor", "collect"),
    ("scheduler", "update"),
    ("outputs", "process"),
    ("core", "add"),
]


@pytest.mark.parametrize(("part", "name"), PLACES)
def test_wherever_it_comes_the_next_call_is_right(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, part: str, name: str
) -> None:
    expected = llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    assert llm.reset_prefix_cache()
    core = llm._core
    parts = {
        "scheduler": core._scheduler,
        "blocks": core._scheduler._blocks,
        "executor": core._executor,
        "outputs": llm._outputs,
        "core": core,
    }
    stream = llm.stream({"prompt_token_ids": [7, 8, 9]}, GREEDY)
    alone = [list(o.outputs[0].token_ids) for o in llm.stream({"prompt_token_ids": [7, 8, 9]}, GREEDY)][-1]
    next(stream)
    once_before(monkeypatch, parts[part], name)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT, PROMPT], GREEDY, use_tqdm=False)
    core._scheduler.check_integrity()
    # The paused stream goes on to its right end, or ends with an error that says what happened.
    try:
        assert [list(o.outputs[0].token_ids) for o in stream][-1] == alone
    except RequestError as error:
        assert "interrupted" in str(error)
    assert not core.has_unfinished
    core._scheduler.check_integrity()
    again = llm.generate(PROMPT, GREEDY, use_tqdm=False)[0]
    assert again.outputs[0].token_ids == expected
