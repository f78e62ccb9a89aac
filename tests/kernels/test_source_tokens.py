"""A kernel's key is the same whatever version of Python makes it."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from triton.runtime.jit import JITCallable

from halimede.kernels import source_tokens as module
from halimede.kernels.source_tokens import source_tokens
from halimede.kernels.spec import all_kernels
from halimede.kernels.specialise import current_sources

VERSIONS = range(11, 16)
SCRIPT = """
import hashlib, json, runpy, sys
tokens = runpy.run_path(sys.argv[1])["source_tokens"]
print(json.dumps([hashlib.sha256(tokens(source).encode()).hexdigest() for source in json.load(sys.stdin)]))
"""


def other_pythons() -> list[str]:
    """Interpreters of other minor versions that run here."""
    pyenv = Path.home() / ".pyenv/versions"
    found = {}
    for minor in VERSIONS:
        candidates = [f"python3.{minor}", *map(str, pyenv.glob(f"3.{minor}.*/bin/python3"))]
        for candidate in candidates:
            try:
                command = [candidate, "-c", "import sys; print(sys.version_info[:2])"]
                printed = subprocess.run(
                    command, capture_output=True, text=True, check=True, timeout=20
                ).stdout
            except (OSError, subprocess.SubprocessError):
                continue
            found[printed.strip()] = candidate
    found.pop(str(sys.version_info[:2]), None)
    return list(found.values())


def sources() -> list[str]:
    """Of every kernel and of all that kernels call."""
    modules = {module for name, module in sys.modules.items() if name.startswith("halimede.kernels.gpu.")}
    functions = [value for m in modules for value in vars(m).values() if isinstance(value, JITCallable)]
    return sorted({function.src for function in functions})


def test_every_version_of_python_sees_the_same_tokens() -> None:
    all_kernels()
    texts = sources()
    assert len(texts) > 40
    pythons = other_pythons()
    if not pythons:
        pytest.skip("needs another minor version of Python")
    here = [hashlib.sha256(source_tokens(text).encode()).hexdigest() for text in texts]
    for python in pythons:
        command = [python, "-c", SCRIPT, str(module.__file__)]
        done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == here, python


def test_every_kernel_has_a_source_of_its_own() -> None:
    found = current_sources()
    assert len(found) > 20
    assert len(set(found.values())) == len(found)
    assert all(
        name.startswith("halimede.kernels.gpu.") and len(digest) == 64 for name, digest in found.items()
    )
