"""Holds the machine code of every kernel against rules and against a stored baseline, without a GPU.

A baseline is made per Triton version: a line per build with a digest of what it was compiled from and a few
numbers of its machine code. The same source gives the same code, so only builds whose digest is not the
baseline's are compiled again, and a sample: of every kernel a signature for each family of targets.
"""

import itertools
import json
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

import triton

from halimede.errors import KernelError
from halimede.kernels.compile import compile_case, plan_case
from halimede.kernels.compiler import Build
from halimede.kernels.inspect import amd_instructions, amd_resource
from halimede.kernels.machine_code_cubin import read_cubin
from halimede.kernels.spec import Case, KernelSpec
from halimede.kernels.target import Target

WIDE_PERCENT = 30
"""Of the bytes that a kernel's load instructions bring, so many come in loads of 16 bytes and more."""

NARROW = frozenset({"_attention_decode_plan_kernel", "_bias_kernel", "_penalty_kernel", "_ban_kernel"})
"""Functions that are not asked for them: they load a few integers, or what is scattered."""

FAMILIES = (
    ("sm_80", "sm_86", "sm_89"),
    ("sm_90", "sm_100", "sm_120"),
    ("gfx90a", "gfx942", "gfx950"),
    ("gfx1100", "gfx1201"),
)
"""Targets whose code is much alike."""

_TOLERANCE = 1.10
_SLACK = {"registers": 4, "shared_bytes": 512, "instructions": 32}
# 8, 16, ... 128: bits of an element.
_PTX_LOAD = re.compile(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b")
_PTX_COPY = re.compile(
    r"\bcp\.async\.c[ag]\.shared\.global[\w.:]*\s+\[[^]]*\],\s*\[[^]]*\],\s*(0x[0-9a-f]+|\d+)"
)
_PTX_TMA = re.compile(r"\bcp\.async\.bulk\.tensor\S*shared")
_PTX_GROUP_MATRIX = re.compile(r"\b(?:wgmma\.mma_async|tcgen05\.mma)\b")
_PTX_MATRIX = re.compile(r"\bmma\.sync\b")
_AMD_LOAD = re.compile(r"(?:global|buffer|flat)_load_(?:lds_)?(\w+)")
_AMD_BYTES = (
    ("x4", 16),
    ("b128", 16),
    ("x3", 12),
    ("b96", 12),
    ("x2", 8),
    ("b64", 8),
    ("dword", 4),
    ("b32", 4),
)
_AMD_MATRIX = re.compile(r"v_s?(?:mfma|wmma)")


@dataclass(frozen=True, slots=True)
class Numbers:
    """Of one build: as in MachineCode; group_matrix: instructions on a warp group's or the tensor memory's
    operands (wgmma, tcgen05); wide_percent: see WIDE_PERCENT, 100 for a kernel that loads nothing."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: int
    matrix: int
    group_matrix: int
    wide_percent: int


@dataclass(frozen=True, slots=True)
class Line:
    """A build in a baseline."""

    digest: str
    numbers: Numbers


Baseline = Mapping[str, Line]
"""Line by "kernel|signature|target|function"."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What `examine` found of a kernel on a target.

    lines: as a new baseline has them. problems: rules that are broken, numbers that got worse. stale: builds
    whose source is not the baseline's, or that are only here or only there. num_compiled: signatures.
    """

    lines: Baseline
    problems: list[str]
    stale: list[str]
    num_compiled: int


def measure(build: Build, target: Target) -> Numbers:
    """The numbers of a build, read in milliseconds: no tool is started."""
    assembly, dynamic = build.compiled.asm, int(build.compiled.metadata.shared)
    if target.backend == "cuda":
        cubin, ptx = read_cubin(assembly["cubin"]), assembly["ptx"]
        group = len(_PTX_GROUP_MATRIX.findall(ptx))
        return Numbers(
            registers=cubin.registers,
            spill_bytes=cubin.stack_bytes if cubin.local_accesses else 0,  # a stack that nobody uses is none
            shared_bytes=dynamic,
            instructions=cubin.instructions,
            matrix=len(_PTX_MATRIX.findall(ptx)) + group,
            group_matrix=group,
            wide_percent=_wide_percent(_ptx_loads(ptx)),
        )
    text = assembly["amdgcn"]
    instructions = amd_instructions(text)
    return Numbers(
        registers=amd_resource(text, "vgpr_count"),
        spill_bytes=amd_resource(text, "private_segment_fixed_size"),
        shared_bytes=dynamic,
        instructions=len(instructions),
        matrix=sum(_AMD_MATRIX.match(line) is not None for line in instructions),
        group_matrix=0,
        wide_percent=_wide_percent(_amd_loads(instructions)),
    )


def _ptx_loads(ptx: str) -> list[int]:
    """Bytes of each load from global memory in a program's text."""
    loads = [int(many or 1) * int(bits) // 8 for many, bits in _PTX_LOAD.findall(ptx)]
    copies = [int(size, 0) for size in _PTX_COPY.findall(ptx)]
    return loads + copies + [16] * len(_PTX_TMA.findall(ptx))


def _amd_loads(instructions: Iterable[str]) -> list[int]:
    sizes = []
    for instruction in instructions:
        found = _AMD_LOAD.match(instruction)
        if found:
            kind = found[1]
            narrow = 2 if "16" in kind or "short" in kind else 1
            sizes.append(next((size for end, size in _AMD_BYTES if kind.endswith(end)), narrow))
    return sizes


def _wide_percent(loads: list[int]) -> int:
    return 100 * sum(size for size in loads if size >= 16) // sum(loads) if loads else 100


def read_baseline(path: Path) -> Baseline | None:
    """The baseline of exactly the running Triton; None if there is none. KernelError if it is damaged."""
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text())
        if stored["triton"] != triton.__version__:
            return None
        return {
            name: Line(digest, Numbers(*map(int, numbers)))
            for name, (digest, *numbers) in stored["builds"].items()
        }
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise KernelError(
            f"{path} is not a baseline ({type(error).__name__}: {error}); make it anew"
        ) from error


def write_baseline(path: Path, lines: Baseline) -> None:
    """Sorted, a line per build."""
    rows = ",\n".join(
        f"{json.dumps(name)}: {json.dumps([line.digest, *astuple(line.numbers)])}"
        for name, line in sorted(lines.items())
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"triton": {json.dumps(triton.__version__)}, "builds": {{\n{rows}\n}}}}\n')


def baseline_path(folder: Path) -> Path:
    """Where the baseline of the running Triton is, by its major and minor version."""
    return folder / f"triton-{'.'.join(triton.__version__.split('.')[:2])}.json"


def examine(
    spec: KernelSpec, target: Target, baseline: Baseline | None, *, everything: bool = False
) -> Findings:
    """Hold a kernel's builds for a target against the rules and the baseline.

    everything: compile every signature, not only those that are stale and the sample. Without it and without
    a baseline only the sample is compiled and judged.
    """
    lines: dict[str, Line] = {}
    problems: list[str] = []
    stale: list[str] = []
    known = baseline or {}
    num_compiled = 0
    sample = sampled_signature(spec, target)
    for number, case in enumerate(spec.signatures):
        plans = plan_case(spec, case, target)
        names = _names(spec, case, target, [plan.name for plan in plans])
        digests = dict(zip(names, (plan.digest for plan in plans), strict=True))
        differing = [name for name in names if name not in known or known[name].digest != digests[name]]
        if everything or number == sample or (differing and baseline is not None):
            num_compiled += 1
            for name, build in zip(names, compile_case(spec, case, target), strict=True):
                lines[name] = Line(digests[name], measure(build, target))
                if name in known:
                    problems += _compare(name, known[name].numbers, lines[name].numbers)
        elif baseline is not None:
            lines |= {name: known[name] for name in names}
        stale += differing
    mine = re.compile(rf"{re.escape(spec.name)}\|.*\|{target.name}\|")
    stale += [name for name in known if mine.match(name) and name not in lines]
    problems += broken_rules(spec, target, lines)
    if everything or baseline is not None:
        problems += _narrow_loads(spec, target, lines)
    return Findings(lines, problems, stale if baseline is not None else [], num_compiled)


def sampled_signature(spec: KernelSpec, target: Target) -> int | None:
    """The number of the signature that is compiled in any case; None if another target stands for this one.

    Which one it is differs by kernel, family and version of Triton, so that together they cover much.
    """
    chance = zlib.crc32(f"{spec.name} {triton.__version__}".encode())
    for number, family in enumerate(FAMILIES):
        if target.name == family[chance % len(family)]:
            return (chance // 6 + number) % len(spec.signatures) if spec.signatures else None
    return None


def _names(spec: KernelSpec, case: Case, target: Target, functions: list[str]) -> list[str]:
    """The builds of a case in a baseline; a function that is started again is #2."""
    names = []
    for at, function in enumerate(functions):
        times = functions[: at + 1].count(function)
        names.append(f"{spec.name}|{case.name}|{target.name}|{function}{f'#{times}' if times > 1 else ''}")
    return names


def _compare(name: str, old: Numbers, new: Numbers) -> list[str]:
    """What got worse than the baseline by more than a tenth, or was lost."""
    problems = []
    for number, slack in _SLACK.items():
        before, now = getattr(old, number), getattr(new, number)
        if now > before * _TOLERANCE and now > before + slack:
            problems.append(f"{name}: {number} went from {before} to {now}")
    for number in ("matrix", "group_matrix"):
        if getattr(old, number) and not getattr(new, number):
            problems.append(f"{name}: no {number} instructions any more")
    if new.wide_percent < old.wide_percent - 10:
        problems.append(
            f"{name}: loads of 16 bytes bring {new.wide_percent} % of all, it was {old.wide_percent} %"
        )
    return problems


def broken_rules(spec: KernelSpec, target: Target, lines: Baseline) -> list[str]:
    """The rules for each build that ships: no spills, fits into shared memory, matrix instructions."""
    problems = []
    for name, line in lines.items():
        if line.numbers.spill_bytes:
            problems.append(f"{name}: spills {line.numbers.spill_bytes} bytes of every thread")
        if line.numbers.shared_bytes > target.shared_memory:
            problems.append(
                f"{name}: {line.numbers.shared_bytes} bytes of shared memory; {target.name} has "
                f"{target.shared_memory}"
            )
    if spec.matrix_product:
        problems.extend(_without_matrix(target, lines))
    return problems


def _narrow_loads(spec: KernelSpec, target: Target, lines: Baseline) -> list[str]:
    """Functions that no signature makes load 16 bytes at a time."""
    problems = []
    for function, group in itertools.groupby(sorted(lines, key=_function), _function):
        widest = max(lines[name].numbers.wide_percent for name in group)
        if function not in NARROW and widest < WIDE_PERCENT:
            problems.append(
                f"{spec.name}|{target.name}|{function}: loads of 16 bytes bring {widest} % of all at best; "
                f"{WIDE_PERCENT} % are asked for"
            )
    return problems


def _function(name: str) -> str:
    return name.rsplit("|", 1)[1].split("#")[0]


def _without_matrix(target: Target, lines: Baseline) -> list[str]:
    """Signatures of which no build has the target's matrix instructions."""
    problems = []
    by_case = itertools.groupby(sorted(lines), lambda name: name.rsplit("|", 1)[0])
    for case, names in by_case:
        numbers = [lines[name].numbers for name in names]
        if not any(n.group_matrix if target.wgmma else n.matrix for n in numbers):
            problems.append(f"{case}: no {'wgmma' if target.wgmma else 'matrix'} instructions")
    return problems
