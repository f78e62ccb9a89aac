"""What a compiled kernel is made of: registers, spills, shared memory, occupancy and the mix of instructions.

NVIDIA: the cubin itself and the disassembler in Triton's wheel. AMD: the assembly that Triton keeps. Neither
needs a GPU. It says nothing of latency, caches or bank conflicts.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from halimede.errors import KernelError
from halimede.kernels.compiler import Build
from halimede.kernels.machine_code_cubin import read_cubin

# Instructions by what they do; an instruction counts in every line that it matches.
_SASS = {
    "wgmma": r"[HQI]GMMA",
    "tcgen05": r"UTC\w*MMA",
    "mma": r"[HIQOD]MMA",
    "tma": r"UTMA|UBLKCP",
    "async_copies": r"LDGSTS",
    "async_copies_128": r"LDGSTS\S*\.128",
    "global_loads": r"LDG\b",
    "global_loads_128": r"LDG\.\S*(128|256)",
    "global_stores": r"STG\b",
    "global_stores_128": r"STG\.\S*(128|256)",
    "shared_loads": r"LDS\b|LDSM",
    "shared_stores": r"STS\b|STSM",
    "shuffles": r"SHFL",
    "special_functions": r"MUFU",
    "barriers": r"BAR\b|SYNCS",
    "atomics": r"ATOM|RED\b|REDG",
    "branches": r"BRA\b|BRX",
}
_AMDGCN = {
    "mfma": r"v_s?mfma",
    "wmma": r"v_s?wmma",
    "async_copies": r"(global|buffer)_load_\S*( .*\blds\b|lds)",
    "async_copies_128": r"(global|buffer)_load_(lds_)?(dwordx4|b128)( .*\blds\b|lds)",
    "global_loads": r"(global|buffer|flat)_load_(?!.*lds)",
    "global_loads_128": r"(global|buffer|flat)_load_(dwordx4|b128)(?!.*lds)",
    "global_stores": r"(global|buffer|flat)_store_",
    "global_stores_128": r"(global|buffer|flat)_store_(dwordx4|b128)",
    "shared_loads": r"ds_(read|load)",
    "shared_stores": r"ds_(write|store)",
    "shuffles": r"ds_b?permute|ds_swizzle|v_permlane|v_readlane|\S*_dpp|.*\b(row_\w+:|quad_perm)",
    "special_functions": r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
    "barriers": r"s_barrier(_wait)?\b",
    "atomics": r"(global|buffer|flat)_atomic|ds_(add|cmpst|cmpstore|max|min)",
    "branches": r"s_c?branch",
}
MATRIX_INSTRUCTIONS = ("wgmma", "tcgen05", "mma", "mfma", "wmma")

# Warps, blocks and bytes of shared memory of a multiprocessor: CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability".
_NVIDIA = {
    80: (64, 32, 164 << 10),
    86: (48, 16, 100 << 10),
    89: (48, 24, 100 << 10),
    90: (64, 32, 228 << 10),
    100: (64, 32, 228 << 10),
    120: (48, 24, 100 << 10),
}
_REGISTERS_PER_MULTIPROCESSOR = 65536
_KEPT_SHARED = 1024
# Waves of a SIMD, SIMDs and bytes of LDS of a compute unit.
_AMD = {"gfx90a": (8, 4, 64 << 10), "gfx942": (8, 4, 64 << 10), "gfx950": (8, 4, 160 << 10)}
_RDNA = (16, 2, 64 << 10)


@dataclass(frozen=True, slots=True)
class MachineCode:
    """One compiled kernel.

    registers: vector registers of a thread, on AMD with the accumulators among them. spill_bytes: of a
    thread; spills: instructions (NVIDIA) or registers (AMD) that are spilled. shared_bytes: of a program,
    static and dynamic. warps: resident on a multiprocessor (AMD: compute unit), of max_warps. mix:
    instructions by what they do; those of 16 bytes and more are also in the line with _128.
    """

    kernel: str
    target: str
    num_warps: int
    num_stages: int
    registers: int
    scalar_registers: int
    accumulators: int
    spill_bytes: int
    spills: int
    shared_bytes: int
    warps: int
    max_warps: int
    instructions: int
    mix: Mapping[str, int]

    @property
    def occupancy(self) -> float:
        """Resident warps as a part of the most that fit."""
        return self.warps / self.max_warps

    @property
    def matrix_instructions(self) -> int:
        """Of every kind."""
        return sum(self.mix[name] for name in MATRIX_INSTRUCTIONS if name in self.mix)


def inspect_build(build: Build) -> MachineCode:
    """Read a compiled kernel. KernelError if that needs a tool that is not there, or its form is unknown."""
    assembly = build.compiled.asm
    if "cubin" in assembly:
        return _inspect_nvidia(build)
    if "amdgcn" in assembly:
        return _inspect_amd(build)
    raise KernelError(f"{build.name} was compiled to {', '.join(assembly)}: there is no machine code to read")


def sass(build: Build) -> str:
    """NVIDIA's disassembly of a kernel. KernelError if the disassembler in Triton's wheel cannot be run."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(build.compiled.asm["cubin"])
        file.flush()
        try:
            done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True)
        except OSError as error:
            raise KernelError(
                f"the disassembler {tool} cannot be run ({error}); it is part of Triton: pip install "
                f"--force-reinstall triton=={triton.__version__}"
            ) from error
    if done.returncode != 0:
        raise KernelError(f"{tool} cannot read {build.name}: {done.stderr.strip()}")
    return done.stdout


def amd_instructions(assembly: str) -> list[str]:
    """The lines of AMD's assembly that are instructions, but for padding."""
    lines = re.findall(r"^\s+([a-z][a-z0-9]*_[^\n]*)", assembly, re.MULTILINE)
    return [line for line in lines if not line.startswith(("s_nop", "s_code_end"))]


def amd_resource(assembly: str, name: str) -> int:
    """A number of the kernel's metadata, such as vgpr_count; 0 if it is not there."""
    found = re.findall(rf"^\s+(?:- )?\.{name}:\s+(\d+)", assembly, re.MULTILINE)
    return int(found[-1]) if found else 0


def _inspect_nvidia(build: Build) -> MachineCode:
    metadata = build.compiled.metadata
    cubin = read_cubin(build.compiled.asm["cubin"])
    lines = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+([^\n]*)", sass(build), re.MULTILINE)
    instructions = [re.sub(r"^@!?U?P\w+\s+", "", line) for line in lines]
    warps, most = _nvidia_warps(metadata, cubin.registers, cubin.shared_bytes)
    return MachineCode(
        kernel=build.name,
        target=f"sm_{metadata.target.arch}",
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        registers=cubin.registers,
        scalar_registers=0,
        accumulators=0,
        spill_bytes=cubin.stack_bytes if cubin.local_accesses else 0,  # a stack that nobody uses is none
        spills=cubin.local_accesses,
        shared_bytes=_nvidia_shared(metadata, cubin.shared_bytes),
        warps=warps,
        max_warps=most,
        instructions=cubin.instructions,
        mix=_count(_SASS, instructions),
    )


def _nvidia_shared(metadata: Any, static: int) -> int:
    """Without the first KiB, which the system keeps: newer architectures count it as the kernel's."""
    return int(metadata.shared) + max(0, static - _KEPT_SHARED)


def _nvidia_warps(metadata: Any, registers: int, static: int) -> tuple[int, int]:
    """Resident warps of a multiprocessor and the most there can be."""
    if metadata.target.arch not in _NVIDIA:
        known = ", ".join(f"sm_{arch}" for arch in _NVIDIA)
        raise KernelError(f"the limits of sm_{metadata.target.arch} are not known here; known: {known}")
    most_warps, most_blocks, shared = _NVIDIA[metadata.target.arch]
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = _REGISTERS_PER_MULTIPROCESSOR // of_warp // 4 * 4 // metadata.num_warps
    by_shared = shared // (_nvidia_shared(metadata, static) + _KEPT_SHARED)
    blocks = min(most_blocks, most_warps // metadata.num_warps, by_registers, by_shared)
    return blocks * int(metadata.num_warps), most_warps


def _inspect_amd(build: Build) -> MachineCode:
    metadata, assembly = build.compiled.metadata, build.compiled.asm["amdgcn"]
    instructions = amd_instructions(assembly)
    warps, most = _amd_warps(metadata, assembly)
    return MachineCode(
        kernel=build.name,
        target=str(metadata.target.arch),
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        registers=amd_resource(assembly, "vgpr_count"),
        scalar_registers=amd_resource(assembly, "sgpr_count"),
        accumulators=amd_resource(assembly, "agpr_count"),
        spill_bytes=amd_resource(assembly, "private_segment_fixed_size"),
        spills=amd_resource(assembly, "vgpr_spill_count") + amd_resource(assembly, "sgpr_spill_count"),
        shared_bytes=int(metadata.shared),
        warps=warps,
        max_warps=most,
        instructions=len(instructions),
        mix=_count(_AMDGCN, instructions),
    )


def _amd_warps(metadata: Any, assembly: str) -> tuple[int, int]:
    """Resident waves of a compute unit: the compiler's count by registers, ours by LDS."""
    waves, simds, lds = _AMD.get(metadata.target.arch, _RDNA)
    by_registers = re.findall(r"^;\s*Occupancy:\s*(\d+)", assembly, re.MULTILINE)
    if not by_registers:
        raise KernelError(f"the assembly for {metadata.target.arch} does not say its occupancy")
    programs = int(by_registers[-1]) * simds // metadata.num_warps
    if metadata.shared:
        programs = min(programs, lds // metadata.shared)
    return programs * int(metadata.num_warps), waves * simds


def _count(patterns: Mapping[str, str], instructions: Iterable[str]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for instruction in instructions:
        found.update(name for name, pattern in patterns.items() if re.match(pattern, instruction))
    return {name: found[name] for name in patterns}
