"""What a launch is compiled for: types, alignment, constants, options, target, and the key that names it.

Triton compiles a kernel once for each kind of arguments. Its own way to find out which kind a launch is needs
a driver, and with it a GPU and a C compiler; this one needs neither, and takes meta tensors as well as real
ones. The key holds nothing of the machine, the folder or the version of Python.
"""

import hashlib
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from types import MappingProxyType
from typing import Any

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from halimede.errors import KernelError
from halimede.kernels.kernel_source import kernel_source
from halimede.kernels.target import Target
from halimede.kernels.tuning import KernelConfig

FORMAT = 1
"""Of what a key is made from; another number makes every kernel of older versions unknown."""

# Triton's marks: a pointer or number divisible by 16; a tensor whose storage has less than 2 GiB (AMD only).
_MARKS = MappingProxyType({"": "", "D": ":16", "S": ":2G", "DS": ":16:2G"})


def _public_version(version: str) -> str:
    """Without the builder's mark (+rocm7.0), which does not change the compiler; a git commit does."""
    public, _, local = version.partition("+")
    return version if local.startswith("git") else public


TRITON_VERSION = _public_version(triton.__version__)
"""The installed Triton's, as keys and manifests have it."""


@dataclass(frozen=True)
class Specialisation:
    """One kernel for one kind of arguments and one target.

    signature: Triton's type of each parameter with its marks, "*bf16:16"; of a constant "constexpr".
    constants: by parameter, also arguments that are None. options: of Triton's compiler.
    """

    kernel: JITFunction[Any]
    target: Target
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The kernel's, as import path and function: "halimede.kernels.gpu.norm:_rms_norm_kernel"."""
        return kernel_name(self.kernel)

    @property
    def types(self) -> tuple[str, ...]:
        """Triton's types of the arguments that are passed at a launch, in order, without marks."""
        return tuple(t.partition(":")[0] for t in self.signature.values() if t != "constexpr")

    @property
    def passed(self) -> tuple[int, ...]:
        """The places of the arguments that are passed at a launch."""
        return tuple(i for i, t in enumerate(self.signature.values()) if t != "constexpr")

    @cached_property
    def digest(self) -> str:
        """Of all that the machine code hangs on besides Triton's version: hex digits of a SHA-256.

        Comments in the source and its place in the file are not in it.
        """
        facts = {
            "source": source_digest(self.kernel),
            "signature": dict(self.signature),
            "constants": {name: json_scalar(value) for name, value in self.constants.items()},
            "options": dict(self.options),
            "target": self.target.machine,
        }
        return hashlib.sha256(_canonical(facts).encode()).hexdigest()

    @cached_property
    def key(self) -> str:
        """The kernel's name in the cache, 32 hex digits: the digest and the compiler that is installed."""
        compiler = {"format": FORMAT, "triton": TRITON_VERSION, "environment": compiler_environment()}
        return hashlib.sha256(f"{_canonical(compiler)}\n{self.digest}".encode()).hexdigest()[:32]


def specialise(
    kernel: JITFunction[Any],
    args: tuple[Any, ...],
    constants: Mapping[str, Any],
    config: KernelConfig,
    target: Target,
) -> Specialisation:
    """What a launch with these arguments is compiled for. constants: all of the kernel's constexprs.

    KernelError under TRITON_INTERPRET, which makes no kernels but interpreted ones.
    """
    if not isinstance(kernel, JITFunction):
        raise KernelError(
            f"Triton interprets {kernel.__name__} and cannot compile it: TRITON_INTERPRET is set; unset it"
        )
    binder = _binder(kernel, target)
    values, kinds, unknown = binder(*args, **constants)
    if unknown:
        raise TypeError(f"{kernel.__name__} has no parameters {', '.join(sorted(unknown))}")
    signature, fixed = {}, {}
    for (name, value), (kind, mark) in zip(values.items(), kinds, strict=True):
        is_constant = kind == "constexpr"
        signature[name] = "constexpr" if is_constant else kind + _MARKS[mark or ""]
        if is_constant:
            fixed[name] = value
    return Specialisation(kernel, target, signature, fixed, config.triton_options(target))


def kernel_name(kernel: JITFunction[Any]) -> str:
    """See Specialisation.name."""
    return f"{kernel.fn.__module__}:{kernel.fn.__qualname__}"


def find_kernel(name: str) -> JITFunction[Any]:
    """The kernel of that name; ImportError, AttributeError or ValueError if there is none."""
    module, function = name.split(":")
    found = getattr(importlib.import_module(module), function)
    if not isinstance(found, JITFunction):
        raise ValueError(f"{name} is not a kernel")
    return found


@cache
def source_digest(kernel: JITFunction[Any]) -> str:
    """Hex digits of the SHA-256 of a kernel's source with all that it calls."""
    return hashlib.sha256(kernel_source(kernel).encode()).hexdigest()


def current_sources() -> Mapping[str, str]:
    """The digest of the source of every kernel there is, by its name."""
    import pkgutil

    from halimede.kernels import gpu

    found = {}
    for info in pkgutil.iter_modules(gpu.__path__):
        module = importlib.import_module(f"{gpu.__name__}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__:
                found[kernel_name(value)] = source_digest(value)
    return found


def compiler_environment() -> dict[str, str]:
    """The environment variables that change what Triton compiles, those that are set."""
    # Line tables are never compiled in, so the variable that leaves them out changes nothing.
    return {k: v for k, v in get_cache_invalidating_env_vars().items() if k != "TRITON_DISABLE_LINE_INFO"}


@cache
def _binder(kernel: JITFunction[Any], target: Target) -> Any:
    """Triton's function from a launch's arguments to (values by name, (type, mark) of each, the rest)."""
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(target.for_triton()))


def json_scalar(value: Any) -> Any:
    """A constant as JSON has it; other types as their repr."""
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def _canonical(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, sort_keys=True, separators=(",", ":"))
