"""The commands of a chat, and how messages are read, without a model."""

import io

import pytest

from halimede.engine.cli.chat_commands import (
    COMMANDS,
    Conversation,
    LeaveChat,
    is_open_block,
    run_command,
    unquote,
)
from halimede.engine.cli.chat_input import PipedMessages
from halimede.errors import HalimedeError
from halimede.scheduler.sampling_params import SamplingParams


@pytest.fixture
def conversation() -> Conversation:
    return Conversation(SamplingParams(max_tokens=None), system="Be kind.")


def test_messages_are_system_turns_and_the_new_one(conversation: Conversation) -> None:
    conversation.add("Hi", "Hello")
    assert [(m["role"], m["content"]) for m in conversation.messages("And?")] == [
        ("system", "Be kind."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "And?"),
    ]
    assert len(conversation.turns) == 2  # asking for them changes nothing


@pytest.mark.parametrize(
    ("argument", "system"),
    [
        ("Be brief.", "Be brief."),
        ('"Be brief."', "Be brief."),
        ('"""Be\nbrief."""', "Be\nbrief."),
        ('Say "no"', 'Say "no"'),
        ('""', None),
    ],
)
def test_system_is_set_and_removed(conversation: Conversation, argument: str, system: str | None) -> None:
    run_command(conversation, f"/system {argument}")
    assert conversation.system == system


def test_params_are_set_as_numbers_words_and_lists(conversation: Conversation) -> None:
    run_command(conversation, "/params temperature=0.2 max_tokens=100 seed=none ignore_eos=TRUE")
    params = conversation.params
    assert (params.temperature, params.max_tokens, params.seed, params.ignore_eos) == (0.2, 100, None, True)
    run_command(conversation, """/params stop='["END", "\\n"]'""")
    assert conversation.params.stop_strings == ("END", "\n")
    run_command(conversation, "/params stop='the end'")
    assert conversation.params.stop_strings == ("the end",)
    assert "temperature" in run_command(conversation, "/params")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("temprature=1", "temperature"),
        ("temperature=hot", "finite number"),
        ("max_tokens=5 top_p=2", "top_p"),
        ("max_tokens=5 temperature", "sets nothing"),
        ("n=2", "no option 'n'"),
        ("stop='", "close the quotes"),
    ],
)
def test_params_that_are_wrong_change_nothing(conversation: Conversation, argument: str, words: str) -> None:
    before = conversation.params.clone()
    with pytest.raises(HalimedeError, match=words):
        run_command(conversation, f"/params {argument}")
    assert conversation.params == before


def test_every_command_is_in_the_help(conversation: Conversation) -> None:
    text = run_command(conversation, "/help")
    assert all(name in text for command in COMMANDS for name in command.names)
    for name in ("/bye", "/exit", "/quit"):
        with pytest.raises(LeaveChat):
            run_command(conversation, name)
    with pytest.raises(HalimedeError, match="did you mean /reset"):
        run_command(conversation, "/rest")


@pytest.mark.parametrize(
    ("text", "is_open", "inner"),
    [
        ('"""', True, '"""'),
        ('"""one', True, '"""one'),
        ('"""one"""', False, "one"),
        ('"""\none\n"""\n', False, "one"),
        ('/system """be', True, '/system """be'),
        ('a """b', False, 'a """b'),
        ('"""a""" or """b"""', False, '"""a""" or """b"""'),
    ],
)
def test_blocks(text: str, is_open: bool, inner: str) -> None:
    assert is_open_block(text) == is_open
    assert unquote(text) == inner


def test_piped_messages() -> None:
    source = PipedMessages(
        io.StringIO('one\r\n\n  \ntwo\\\nthree\n"""\nfour\n\nfive"""\n"""unfinished\nblock')
    )
    read = [source.read() for _ in range(4)]
    assert read == ["one", "two\nthree", '"""\nfour\n\nfive"""', '"""unfinished\nblock\n']
    with pytest.raises(EOFError):
        source.read()
