"""Runs a Triton kernel on CPU tensors, right also for bfloat16 and float8, one call at a time.

Triton's own interpreter multiplies bfloat16 as the integers that hold it, truncates where a GPU rounds to
nearest even, and once used leaves `triton.language` changed, so that nothing compiles any more. Here bfloat16
operands are widened to float32 and results rounded by torch, and everything that is patched is put back
after each call: the same kernel object can be interpreted and compiled in one process.

It runs one program after the other, each operation in NumPy: some 50 us an operation whatever its size, so
it is for tests and for looking into a kernel, not for use. Not supported: inline assembly, libdevice.
"""

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

_TORCH_TYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "fp8e4b8": torch.float8_e4m3fnuz,
    "fp8e5b16": torch.float8_e5m2fnuz,
}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Builder methods whose bfloat16 operands must be widened.
_ARITHMETIC = (
    "binary_op",
    "unary_op",
    "ternary_op",
    "create_fma",
    "create_rsqrt",
    "create_erf",
    "create_fabs",
)
_triton_convert = interpreter._convert_float
_LANGUAGE = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})


def interpret(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Run every program of the grid; what the kernel writes is in the CPU tensors of `args` afterwards."""
    with _patched(), np.errstate(all="ignore"):
        _interpreted(kernel.fn).run(*args, grid=grid, warmup=False, **constants)


@functools.cache
def _interpreted(function: Any) -> Any:
    return interpreter.InterpretedFunction(function)


@contextlib.contextmanager
def _patched() -> Iterator[None]:
    """Triton as the interpreter needs it, and as it was again afterwards."""
    builder, saved = interpreter.InterpreterBuilder, []

    def replace(owner: Any, name: str, value: Any) -> None:
        saved.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    replace(interpreter, "_convert_float", _convert)
    for name in _ARITHMETIC:
        if hasattr(builder, name):
            replace(builder, name, _widening(getattr(builder, name)))
    replace(builder, "create_dot", _widening_dot(builder.create_dot))
    replace(builder, "cast_impl", _casting(builder.cast_impl))
    replace(interpreter, "_patch_lang_tensor", _patching_scalars(interpreter._patch_lang_tensor))
    replace(interpreter, "_patch_lang_core", _patching_types(interpreter._patch_lang_core))
    # Helpers are JITFunction objects, which refuse to be called outside of a kernel.
    replace(JITFunction, "__call__", lambda self, *a, **k: _interpreted(self.fn).rewrite()(*a, **k))
    scope = interpreter._patch_lang(_LANGUAGE)
    try:
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = True
            yield
    finally:
        scope.restore()
        for owner, name, value in reversed(saved):
            setattr(owner, name, value)


def _convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    """In place of Triton's cast between float types (arrays of the bits): torch's, which rounds to even."""
    old, new = _TORCH_TYPES.get(source.name), _TORCH_TYPES.get(target.name)
    if old is None or new is None or rounding == interpreter._ir.ROUNDING_MODE.RTZ:
        return _triton_convert(values, source, target, rounding)
    bits = np.ascontiguousarray(values).view(f"i{source.primitive_bitwidth // 8}")
    if source.primitive_bitwidth == 8:
        bits = bits.view(np.uint8)
    # copy: torch warns of memory that may not be written.
    wide = torch.from_numpy(bits.copy()).view(old).reshape(np.shape(values))
    if new.itemsize == 1:
        wide = wide.float()
    return wide.to(new).view(_BITS[new.itemsize]).numpy().view(f"u{new.itemsize}")


def _is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, interpreter.TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    if not _is_bfloat16(handle):
        return handle
    data = _convert(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
    return interpreter.TensorHandle(data, tl.float32)


def _widening(method: Any) -> Any:
    """A builder's arithmetic: bfloat16 in float32, rounded once."""

    def widened(self: Any, *args: Any) -> Any:
        if not any(_is_bfloat16(arg) for arg in args):
            return method(self, *args)
        result = method(self, *map(_widen, args))
        if result.data.dtype == np.bool_:
            return result
        data = _convert(result.data.astype(np.float32), tl.float32, tl.bfloat16, None).view(np.uint16)
        return interpreter.TensorHandle(data, tl.bfloat16)

    return widened


def _widening_dot(method: Any) -> Any:
    def dot(self: Any, a: Any, b: Any, accumulator: Any, *rest: Any) -> Any:
        return method(self, _widen(a), _widen(b), accumulator, *rest)

    return dot


def _casting(method: Any) -> Any:
    """Casts between bfloat16 and types other than float32, which Triton's interpreter makes of the bits."""

    def cast(self: Any, source: Any, target: Any) -> Any:
        pair = {source.dtype.scalar, target.scalar}
        if tl.bfloat16 in pair and len(pair) == 2 and tl.float32 not in pair:
            source = method(self, source, tl.float32)
        return method(self, source, target)

    return cast


def _patching_scalars(patch: Any) -> Any:
    """A loaded scalar as a loop's bound or an `if`'s condition, which Triton 3.6 refuses with NumPy 2.4."""

    def patched(tensor: Any, *args: Any) -> None:
        patch(tensor, *args)
        scope = next((arg for arg in args if hasattr(arg, "set_attr")), None)
        for name, value in (("__index__", _as_int), ("__bool__", _as_bool)):
            if scope is None:
                setattr(tensor, name, value)
            else:
                scope.set_attr(tensor, name, value)

    return patched


def _patching_types(patch: Any) -> Any:
    """Types that Triton 3.6's interpreter holds values of, but forgets when something is cast to them."""

    def patched(lang: Any, *args: Any) -> None:
        patch(lang, *args)
        scope = next((arg for arg in args if hasattr(arg, "set_attr")), None)
        known = lang.dtype.to_ir

        def to_ir(self: Any, builder: Any) -> Any:
            return builder.get_fp8e4b8_ty() if self.name == "fp8e4b8" else known(self, builder)

        if scope is None:
            lang.dtype.to_ir = to_ir
        else:
            scope.set_attr(lang.dtype, "to_ir", to_ir)

    return patched


def _as_int(scalar: Any) -> int:
    return int(np.asarray(scalar.handle.data).reshape(-1)[0])


def _as_bool(scalar: Any) -> bool:
    data = np.asarray(scalar.handle.data)
    return bool(data.reshape(-1)[0]) if data.size == 1 else True
