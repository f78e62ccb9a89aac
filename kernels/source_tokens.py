"""The text of a function as its tokens, the same on every version of Python; imports nothing of ours."""

import io
import tokenize

_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER)
# A token of layout is named: its text is the indentation as it happens to be written.
_NAMED = (tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE)


def source_tokens(source: str) -> str:
    """The tokens of a function's source without comments, docstrings and the way it is laid out."""
    kept: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in _LAYOUT:
            continue
        if token.type == tokenize.NEWLINE and _is_docstring(kept):
            kept.pop()
            continue
        kept.append(token)
    return " ".join(tokenize.tok_name[t.type] if t.type in _NAMED else t.string for t in kept)


def _is_docstring(kept: list[tokenize.TokenInfo]) -> bool:
    return (
        len(kept) > 1
        and kept[-1].type == tokenize.STRING
        and kept[-2].type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    )
