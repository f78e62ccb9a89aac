"""Finds stop strings in text that arrives in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Collects a completion's text until one of its stop strings appears.

    keep: leave the stop string in the text. Text that may turn out to be the start of a stop string is in
    `text` but not in `safe_text` nor in what `take` gives before the end, so that a stream never shows what
    would have to be taken back.

    A piece costs the same however long the text before it is.
    """

    __slots__ = ("_fresh", "_holds", "_keep", "_strings", "_tail", "_tail_length", "_taken")

    def __init__(self, strings: Sequence[str], *, keep: bool) -> None:
        self._strings = tuple(strings)
        self._keep = keep
        self._holds = bool(strings) and not keep
        self._taken: list[str] = []
        self._fresh: list[str] = []
        # The end of the text: all of it that can be part of a match that is not complete yet.
        self._tail = ""
        self._tail_length = max(map(len, self._strings), default=1) - 1

    def add(self, piece: str, *, check: bool) -> str | None:
        """Append a piece; the stop string that now ends the text, which is cut there, or None.

        check: False takes the piece as it is (fewer than min_tokens so far).
        """
        if not piece:
            return None
        self._fresh.append(piece)
        if not self._strings:
            return None
        before, text = len(self._tail), self._tail + piece
        self._tail = text[max(0, len(text) - self._tail_length) :]
        if not check:
            return None
        # A match must reach into the piece: what came before was searched, or was not to be.
        found = [(at, s) for s in self._strings if (at := text.find(s, max(0, before - len(s) + 1))) >= 0]
        if not found:
            return None
        # The string that is complete first ends the text, however the text was cut into pieces.
        at, string = min(found, key=lambda match: (match[0] + len(match[1]), match[0]))
        # What a match starts with was held back, so nobody has taken what is cut off here.
        fresh = "".join(self._fresh)
        self._fresh = [fresh[: len(fresh) + at + (len(string) if self._keep else 0) - len(text)]]
        return string

    def take(self, *, everything: bool) -> str:
        """The text that no call before gave, without a tail that could become a stop string.

        everything: the text has ended, and such a tail is part of it.
        """
        fresh = "".join(self._fresh)
        self._fresh.clear()
        if self._holds and not everything and (num_held := min(self._num_held(), len(fresh))):
            self._fresh.append(fresh[-num_held:])
            fresh = fresh[:-num_held]
        self._taken.append(fresh)
        return fresh

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self._taken) + "".join(self._fresh)

    @property
    def safe_text(self) -> str:
        """The text without a tail that could become a stop string."""
        text = self.text
        return text[: len(text) - self._num_held()]

    def _num_held(self) -> int:
        """Characters at the end of the text that could become a stop string."""
        if self._holds:
            for length in range(len(self._tail), 0, -1):
                if any(s.startswith(self._tail[-length:]) for s in self._strings):
                    return length
        return 0
