"""The source that a Triton kernel is compiled from, with what it calls: same text, same machine code."""

import ast
import functools
import types
from typing import Any

from triton.language.core import constexpr
from triton.runtime.jit import JITCallable

from halimede.kernels.source_tokens import source_tokens


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
    found[name] = source_tokens(function.src)
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
