import random

import pytest

from halimede.engine.stop_strings import StopStrings


def feed(strings: list[str], pieces: list[str], keep: bool = False) -> tuple[str, str | None, list[str]]:
    stop = StopStrings(strings, keep=keep)
    shown = []
    for piece in pieces:
        found = stop.add(piece, check=True)
        if found is not None:
            return stop.text, found, shown
        shown.append(stop.safe_text)
    return stop.text, None, shown


def test_a_stop_string_across_pieces_ends_the_text_before_it() -> None:
    text, found, _ = feed(["END"], ["one E", "N", "D two"])
    assert (text, found) == ("one ", "END")


def test_keep_leaves_the_stop_string_and_drops_what_follows() -> None:
    text, found, _ = feed(["END"], ["one E", "N", "D two"], keep=True)
    assert (text, found) == ("one END", "END")


def test_the_match_that_is_complete_first_wins_then_the_longer_one() -> None:
    assert feed(["c", "abc"], ["xabc"])[:2] == ("x", "abc")
    for pieces in (["abcd"], ["abc", "d"], ["a", "b", "c", "d"]):
        assert feed(["abcd", "bc"], pieces)[:2] == ("a", "bc")


def test_a_long_stop_string_does_not_make_a_short_one_match_below_min_tokens() -> None:
    stop = StopStrings(["S", "z" * 26], keep=False)
    assert stop.add(" S", check=False) is None
    assert stop.add("eaop", check=True) is None
    assert stop.safe_text == " Seaop"


def test_below_min_tokens_nothing_is_searched_later_either() -> None:
    stop = StopStrings(["ab"], keep=False)
    assert stop.add("ab", check=False) is None
    assert stop.add("cd", check=True) is None
    assert stop.text == "abcd"


@pytest.mark.parametrize("seed", range(50))
def test_a_stream_never_shows_what_is_taken_back_and_equals_one_search(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("ab\n") for _ in range(60))
    strings = ["".join(rng.choice("ab\n") for _ in range(rng.randint(1, 6))) for _ in range(3)]
    pieces, at = [], 0
    while at < len(text):
        size = rng.randint(0, 4)
        pieces.append(text[at : at + size])
        at += size
    final, found, shown = feed(strings, pieces)
    assert all(final.startswith(s) or len(s) <= len(final) for s in shown)
    assert all(final.startswith(s) for s in shown)
    if found is None:
        assert final == text
        assert not any(s in text for s in strings)
    else:
        assert text.startswith(final + found)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("seed", range(50))
def test_what_is_taken_is_what_is_safe_each_character_once(seed: int, keep: bool) -> None:
    rng = random.Random(seed)
    strings = ["".join(rng.choice("ab") for _ in range(rng.randint(3, 7))) for _ in range(2)]
    stop = StopStrings(strings, keep=keep)
    taken = ""
    for position in range(40):
        piece = "".join(rng.choice("ab") for _ in range(rng.randint(0, 3)))
        if stop.add(piece, check=position > 3) is not None:
            break
        if rng.random() < 0.7:
            taken += stop.take(everything=False)
            assert taken == stop.safe_text
    assert taken + stop.take(everything=True) == stop.text
    assert stop.take(everything=True) == ""
