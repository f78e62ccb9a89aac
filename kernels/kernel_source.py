"""The source that a Triton kernel is compiled from, with what it calls: same text, same machine code."""

import ast
import functools
import io
import tokenize
import types
from typing import Any

from triton.language.core import constexpr
from triton.runtime.jit import JITCallable

_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER)


@functools.cache
def kernel_source(kernel: Any) -> str:
    """Of a @triton.jit function and of all its own helpers, without comments and docstrings, and the global
    constants that they use. What belongs to Triton itself is left out."""
    found: dict[str, str] = {}
    _collect(kernel, found)
    return "\n".join(found[name] for name in sorted(found))


def _collect(function: Any, found: dict[str, str]) -> None:
    name = f"{function.fn.__module__}.{function.fn.__qualname__}"
    if name in found:
        return
    found[name] = _tokens(function.src)
    scope = function.get_capture_scope()
    for node in ast.walk(ast.parse(function.src)):
        value = _value_of(node, scope)
        if isinstance(value, JITCallable):
            if not value.fn.__module__.startswith("triton."):
                _collect(value, found)
        elif isinstance(value, constexpr):
            found[f"{name} {ast.unparse(node)}"] = f"{ast.unparse(node)} = {value.value!r}"


def _value_of(node: ast.AST, scope: dict[str, Any]) -> Any:
    """Of a global name, or of a name in a module."""
    if isinstance(node, ast.Name):
        return scope.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _value_of(node.value, scope)
        if isinstance(owner, types.ModuleType):
            return getattr(owner, node.attr, None)
    return None


def _tokens(source: str) -> str:
    kept: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in _LAYOUT:
            continue
        if token.type == tokenize.NEWLINE and _is_docstring(kept):
            kept.pop()
            continue
        kept.append(token)
    # A token of layout is named: its text is the indentation as it happens to be written.
    named = (tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE)
    return " ".join(tokenize.tok_name[t.type] if t.type in named else t.string for t in kept)


def _is_docstring(kept: list[tokenize.TokenInfo]) -> bool:
    return (
        len(kept) > 1
        and kept[-1].type == tokenize.STRING
        and kept[-2].type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    )
