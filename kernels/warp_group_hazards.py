"""Registers that are written while a warp group's product still reads them, found in NVIDIA's disassembly.

A Hopper product (HGMMA, QGMMA, IGMMA) may take its first operand from registers and reads them after the
instruction has been issued, until a wait for its group. Triton 3.6 lets such products run on into the next
round of a loop (`wgmma.wait_group 7`), and ptxas then hands their registers out again before the wait:
results are wrong now and then. Nothing of that shows in Triton's IR, so the machine code is read: straight
through, and each loop twice.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_PRODUCT = re.compile(r"[HQI]GMMA")
_REGISTER = re.compile(r"^R(\d+)\b")
_TARGET = re.compile(r"\.L_x_\d+")
_OPERAND_REGISTERS = 4
_KEPT = re.compile(r"WARPGROUP\.DEPBAR")
# What has no register to write: its first operand is an address, a barrier or a predicate.
_NO_RESULT = re.compile(
    r"ST[GSL]?\b|STSM|RED|LDGSTS|LDGDEPBAR|DEPBAR|BAR|BRA|EXIT|NOP|ISETP|FSETP|HSETP|DSETP|PLOP|WARPGROUP|WARPSYNC"
    r"|U[A-Z]|SYNCS|FENCE|MEMBAR|ERRBAR|CCTL|R2UR|VOTEU|ELECT|RET|CALL|BSSY|BSYNC|BREAK|YIELD"
)
_WIDTHS = (
    (re.compile(r"\.128|\.x4|M88\.4"), 4),
    (re.compile(r"\.64|WIDE|M88\.2|F64|DADD|DMUL|DFMA|CS2R"), 2),
)


@dataclass(frozen=True, slots=True)
class _Instruction:
    address: str
    name: str
    operands: tuple[str, ...]


@dataclass(slots=True)
class _Flight:
    """Registers that products read, by group: those that are committed, and those of the group being made."""

    groups: list[set[int]] = field(default_factory=list)
    pending: set[int] = field(default_factory=set)


def overwritten_operands(sass: str) -> list[str]:
    """Instructions that write a register of a product in flight, as text; empty for sound code."""
    code, labels = _parsed(sass)
    found = dict.fromkeys(_hazards(code))
    for end, instruction in enumerate(code):
        target = (
            _TARGET.search(" ".join(instruction.operands)) if instruction.name.startswith("BRA") else None
        )
        start = labels.get(target[0]) if target else None
        if start is not None and start <= end:
            loop = code[start : end + 1]
            found |= dict.fromkeys(_hazards([*loop, *loop]))
    return list(found)


def _parsed(sass: str) -> tuple[list[_Instruction], dict[str, int]]:
    code: list[_Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        label = _LABEL.match(line)
        if label is not None:
            labels[label[1]] = len(code)
        found = _LINE.search(line)
        if found is not None:
            operands = tuple(part.strip() for part in found[3].replace("`(", "").replace(")", "").split(","))
            code.append(_Instruction(found[1], found[2], operands))
    return code, labels


def _hazards(code: Sequence[_Instruction]) -> Iterator[str]:
    flight = _Flight()
    for instruction in code:
        if _KEPT.match(instruction.name):
            kept = int(instruction.operands[-1], 16)
            flight.groups = flight.groups[-kept:] if kept else []
            continue
        if _PRODUCT.match(instruction.name):
            flight.pending |= _operand_of(instruction)
            if "gsb0" in instruction.operands:
                flight.groups.append(flight.pending)
                flight.pending = set()
            continue
        read = flight.pending.union(*flight.groups)
        lost = read & _results(instruction)
        if lost:
            yield f"/*{instruction.address}*/ {instruction.name} {', '.join(instruction.operands)}"


def _operand_of(product: _Instruction) -> set[int]:
    """The registers of its first factor; none if that is in shared memory."""
    register = _REGISTER.match(product.operands[1])
    return set() if register is None else set(range(int(register[1]), int(register[1]) + _OPERAND_REGISTERS))


def _results(instruction: _Instruction) -> set[int]:
    register = _REGISTER.match(instruction.operands[0])
    if register is None or _NO_RESULT.match(instruction.name):
        return set()
    width = next((number for pattern, number in _WIDTHS if pattern.search(instruction.name)), 1)
    return set(range(int(register[1]), int(register[1]) + width))


_UNIFORM = re.compile(r"UR(\d+)\b")
_DESCRIPTOR = re.compile(r"gdesc\[UR(\d+)\]")
_WRITES_UNIFORM = re.compile(r"U[A-Z]|R2UR|S2UR|VOTEU|LDCU")


def undefined_uniforms(sass: str) -> list[str]:
    """Instructions that read a uniform register which nothing before them in the text has written.

    Sound code has none. ptxas of Triton 3.6 left the address of a matrix so, for two products into one sum
    whose second factors are stored in shared memory in turn.
    """
    code, _ = _parsed(sass)
    written: set[int] = set()
    found = []
    for instruction in code:
        results = _uniform_results(instruction)
        if _uniform_operands(instruction, skip_first=bool(results)) - written:
            found.append(f"/*{instruction.address}*/ {instruction.name} {', '.join(instruction.operands)}")
        written |= results
    return found


def _uniform_results(instruction: _Instruction) -> set[int]:
    register = re.fullmatch(r"UR(\d+)", instruction.operands[0])
    if register is None or not _WRITES_UNIFORM.match(instruction.name):
        return set()
    width = 4 if ".128" in instruction.name else 2 if re.search(r"\.64|WIDE", instruction.name) else 1
    return set(range(int(register[1]), int(register[1]) + width))


def _uniform_operands(instruction: _Instruction, *, skip_first: bool) -> set[int]:
    """A product names the first of four registers: two of its first matrix, if that is in memory, two of
    its second."""
    operands = instruction.operands[1:] if skip_first else instruction.operands
    found: set[int] = set()
    for operand in operands:
        for first in map(int, _DESCRIPTOR.findall(operand)):
            from_registers = _REGISTER.match(instruction.operands[1]) is not None
            found |= set(range(first + 2 * from_registers, first + 4))
        plain = _DESCRIPTOR.sub("", operand)
        found |= {int(number) for number in _UNIFORM.findall(plain)}
    return found
