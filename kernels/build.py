"""Builds the binary of a kernel, with what a manifest says of it."""

import hashlib
from typing import Any

from halimede.errors import KernelError
from halimede.kernels.compiler import compile_specialisation
from halimede.kernels.inspect import amd_resource
from halimede.kernels.machine_code_cubin import read_cubin
from halimede.kernels.specialise import TRITON_VERSION, Specialisation, json_scalar, source_digest
from halimede.kernels.store import KernelEntry


def build(specialisation: Specialisation) -> tuple[KernelEntry, bytes]:
    """Compile it, here and now, for its target. KernelError, with the compiler's message, if that fails."""
    try:
        compiled = compile_specialisation(specialisation, keep=False)
    except Exception as error:
        raise KernelError(
            f"{specialisation.name} cannot be compiled for {specialisation.target.machine} by Triton "
            f"{TRITON_VERSION}: {type(error).__name__}: {error}"
        ) from error
    _check_launchable(specialisation, compiled.metadata)
    scratch_bytes, scratch_align = _scratch(compiled.metadata)
    is_cuda = specialisation.target.backend == "cuda"
    binary: bytes = compiled.asm["cubin" if is_cuda else "hsaco"]
    registers, spills = _resources(compiled.asm, is_cuda=is_cuda)
    entry = KernelEntry(
        key=specialisation.key,
        kernel=specialisation.name,
        target=specialisation.target.machine,
        signature=dict(specialisation.signature),
        constants={name: json_scalar(value) for name, value in specialisation.constants.items()},
        options=dict(specialisation.options),
        triton=TRITON_VERSION,
        source=source_digest(specialisation.kernel),
        entry_point=compiled.metadata.name,
        threads=compiled.metadata.num_warps * compiled.metadata.target.warp_size,
        shared_memory=compiled.metadata.shared,
        registers=registers,
        spills=spills,
        sha256=hashlib.sha256(binary).hexdigest(),
        size=len(binary),
        scratch_bytes=scratch_bytes,
        scratch_align=scratch_align,
    )
    return entry, binary


def _scratch(metadata: Any) -> tuple[int, int]:
    """Bytes of global memory that each program writes for itself, such as its TMA descriptors, and alignment.

    AMD's backend of Triton 3.6 has none, and no such fields.
    """
    size = getattr(metadata, "global_scratch_size", 0) or 0
    return size, (getattr(metadata, "global_scratch_align", 1) or 1) if size else 1


def _resources(assembly: Any, *, is_cuda: bool) -> tuple[int, int]:
    """Registers and spilled bytes of a thread."""
    if is_cuda:
        cubin = read_cubin(assembly["cubin"])
        return cubin.registers, cubin.stack_bytes if cubin.local_accesses else 0
    text = assembly["amdgcn"]
    return amd_resource(text, "vgpr_count"), amd_resource(text, "private_segment_fixed_size")


def _check_launchable(specialisation: Specialisation, metadata: Any) -> None:
    """Our launches are plain ones: what needs memory or attributes of Triton's launcher is not for them."""

    def has(name: str) -> Any:  # not every backend of every version has all of them
        return getattr(metadata, name, 0)

    asked = {
        "memory for a profile": has("profile_scratch_size"),
        "clusters": metadata.num_ctas > 1,
        "a cooperative launch": has("launch_cooperative_grid"),
        "a dependent launch": has("launch_pdl"),
    }
    for what, wanted in asked.items():
        if wanted:
            raise KernelError(f"{specialisation.name} needs {what}, which its launch does not give it")
