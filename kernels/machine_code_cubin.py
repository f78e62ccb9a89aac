"""Reads an NVIDIA kernel's ELF (a cubin) without NVIDIA's tools: registers, stack, shared memory, size.

In a .nv.info section a record is a format and an attribute of one byte each and two bytes that are a value
or, for format 4, the length of what follows. An instruction has 16 bytes since Volta; its lowest 12 bits are
the operation. tests/kernels/test_inspect.py holds what is read here against NVIDIA's own tools.
"""

import struct
from dataclasses import dataclass

from halimede.errors import KernelError

_WITH_PAYLOAD = 4
_REGISTERS, _FRAME_SIZE = 0x2F, 0x11
_NOP, _LOAD_LOCAL, _STORE_LOCAL = 0x918, 0x983, 0x387
_WITHOUT_CONTENT = 8


@dataclass(frozen=True, slots=True)
class Cubin:
    """registers, stack_bytes: of a thread. shared_bytes: static, with the 1 KiB that sm_90 and later keep.
    instructions: without padding. local_accesses: loads and stores of the stack."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: int
    local_accesses: int


def read_cubin(cubin: bytes) -> Cubin:
    """KernelError if it is not a cubin with one kernel."""
    try:
        sections = _sections(cubin)
        (kernel,) = (name.removeprefix(".text.") for name in sections if name.startswith(".text."))
        attributes = _attributes(sections[".nv.info"][0])
        code = sections[f".text.{kernel}"][0]
        operations = [int.from_bytes(code[at : at + 2], "little") & 0xFFF for at in range(0, len(code), 16)]
        return Cubin(
            registers=attributes[_REGISTERS],
            stack_bytes=attributes[_FRAME_SIZE],
            shared_bytes=sections.get(f".nv.shared.{kernel}", (b"", 0))[1],
            instructions=len(operations) - operations.count(_NOP),
            local_accesses=operations.count(_LOAD_LOCAL) + operations.count(_STORE_LOCAL),
        )
    except (struct.error, ValueError, KeyError, UnicodeDecodeError) as error:
        raise KernelError(
            f"a compiled kernel of {len(cubin)} bytes cannot be read ({type(error).__name__}: {error}); "
            "Triton's compiler may have a new format"
        ) from error


def _sections(elf: bytes) -> dict[str, tuple[bytes, int]]:
    """Name to content and size, which differ for a section of zeros."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * entry_size) for i in range(count)]
    names = headers[names_index][4]
    found = {}
    for name_at, kind, _flags, _address, offset, size in headers:
        start = names + name_at
        name = elf[start : elf.index(0, start)].decode()
        found[name] = (b"" if kind == _WITHOUT_CONTENT else elf[offset : offset + size], size)
    return found


def _attributes(info: bytes) -> dict[int, int]:
    """The second word of each record of two words, which are a symbol and a value."""
    found, at = {}, 0
    while at < len(info):
        kind, attribute, length = struct.unpack_from("<BBH", info, at)
        at += 4
        if kind == _WITH_PAYLOAD:
            if length == 8:
                found[attribute] = struct.unpack_from("<II", info, at)[1]
            at += length
    return found
