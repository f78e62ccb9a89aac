"""Finds stop strings in text that arrives in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Collects a completion's text until one of its stop strings appears.

    keep: leave the stop string in the text. Text that may turn out to be the start of a stop string is in
    `text` but not in `safe_text`, so that a stream never shows what would have to be taken back.
    """

    def __init__(self, strings: Sequence[str], *, keep: bool) -> None:
        self._strings = tuple(strings)
        self._keep = keep
        self._longest = max(map(len, self._strings), default=1)
        self.text = ""

    def add(self, piece: str, *, check: bool) -> str | None:
        """Append a piece; the stop string that now ends the text, which is cut there, or None.

        check: False takes the piece as it is (fewer than min_tokens so far).
        """
        old_length = len(self.text)
        self.text += piece
        if not check or not piece or not self._strings:
            return None
        # A match must reach into the piece: what came before was searched, or was not to be.
        found = [
            (at, s) for s in self._strings if (at := self.text.find(s, max(0, old_length - len(s) + 1))) >= 0
        ]
        if not found:
            return None
        # The string that is complete first ends the text, however the text was cut into pieces.
        at, string = min(found, key=lambda match: (match[0] + len(match[1]), match[0]))
        self.text = self.text[: at + len(string) if self._keep else at]
        return string

    @property
    def safe_text(self) -> str:
        """The text without a tail that could become a stop string."""
        if self._keep or not self._strings:
            return self.text
        for length in range(min(self._longest - 1, len(self.text)), 0, -1):
            tail = self.text[-length:]
            if any(s.startswith(tail) for s in self._strings):
                return self.text[:-length]
        return self.text
