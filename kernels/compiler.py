"""Triton's compiler for one specialisation: it and the ptxas in its wheel need no GPU, toolkit or driver."""

import contextlib
import io
import tempfile
import threading
from dataclasses import dataclass
from typing import Any

import triton
from triton.compiler.compiler import ASTSource, make_backend

from halimede.kernels.specialise import Specialisation
from halimede.kernels.tuning import KernelConfig

# Triton's settings and standard output, which are changed while compiling, belong to the whole process.
_compiling = threading.Lock()


@dataclass(frozen=True, slots=True)
class Build:
    """One compiled specialisation: Triton's CompiledKernel and what it was compiled with."""

    name: str
    config: KernelConfig
    compiled: Any


def compile_specialisation(specialisation: Specialisation, *, keep: bool = True) -> Any:
    """Triton's CompiledKernel of it. keep: in Triton's own cache, too, and take it from there.

    Raises what Triton raises. Compiles one at a time in a process: Triton's settings are the process's.
    """
    names = list(specialisation.signature)
    backend = make_backend(specialisation.target.for_triton())
    attributes = {}
    for at, kind in enumerate(specialisation.signature.values()):
        marks = kind.partition(":")[2]
        found = ("D" if "16" in marks else "") + ("S" if "2G" in marks else "")
        if found:
            attributes[(at,)] = backend.parse_attr(found)
    source = ASTSource(
        specialisation.kernel,
        {name: kind.partition(":")[0] for name, kind in specialisation.signature.items()},
        {(names.index(name),): value for name, value in specialisation.constants.items()},
        attributes,
    )
    knobs = triton.knobs
    with _compiling, contextlib.ExitStack() as stack:
        # ptxas prints the whole program on an error.
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(knobs.compilation.scope())
        # Paths of the machine that compiles would be in the tables.
        knobs.compilation.disable_line_info = True
        if not keep:
            stack.enter_context(knobs.cache.scope())
            knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="halimede-"))
        return triton.compile(
            source, target=specialisation.target.for_triton(), options=dict(specialisation.options)
        )
