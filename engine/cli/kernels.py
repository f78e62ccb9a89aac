"""`halimede kernels`: the Triton kernels, and what the compiler makes of them; no GPU need be there."""

import difflib
import enum
import json
import sys
from collections.abc import Collection, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halimede.engine.cli.kernel_cache import CacheDirectory, list_cached, register
from halimede.engine.cli.table import print_rows
from halimede.errors import KernelError

if TYPE_CHECKING:
    from halimede.kernels.compiler import Build
    from halimede.kernels.inspect import MachineCode
    from halimede.kernels.spec import Case, KernelSpec

app = typer.Typer(
    help="Look into the Triton kernels; no GPU is needed.", no_args_is_help=True, rich_markup_mode=None
)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Assembly(enum.StrEnum):
    """What Triton and the compilers below it write, from the highest to the lowest."""

    TTGIR = "ttgir"
    PTX = "ptx"
    SASS = "sass"
    AMDGCN = "amdgcn"


@app.command("list", short_help="List the kernels, or those in the kernel cache.")
def list_kernels(
    cached: Annotated[
        bool, typer.Option("--cached", help="List compiled kernels in the kernel cache instead.")
    ] = False,
    target: Annotated[
        str | None, typer.Option("--target", help="Of the cache, only these: sm_90,gfx942.")
    ] = None,
    kernel_cache_dir: CacheDirectory = None,
    as_json: _Json = False,
) -> None:
    """List the kernels: name, summary, the shapes of serving that each is checked for (signatures).

    Of those in the cache: kernel, target, Triton's version; registers and spilled bytes of a thread; shared
    memory of a program and size of the binary in bytes; key. As JSON, all that their manifests hold.
    """
    if cached:
        list_cached(kernel_cache_dir, target, as_json=as_json)
        return
    if target is not None or kernel_cache_dir is not None:
        raise typer.BadParameter("--target and --kernel-cache-dir are for --cached; add it or leave them out")
    kernels = _kernels()
    if as_json:
        listed = [
            {"name": k.name, "summary": k.summary, "signatures": [case.name for case in k.signatures]}
            for k in kernels.values()
        ]
        print(json.dumps(listed, indent=2, ensure_ascii=False))
        return
    print_rows(
        ("Kernel", "Summary", "Signatures"),
        [(k.name, k.summary, str(len(k.signatures))) for k in kernels.values()],
    )


@app.command("inspect", no_args_is_help=True)
def inspect_kernel(
    kernel: Annotated[str, typer.Argument(help="As `halimede kernels list` names it.")],
    target: Annotated[str, typer.Option("--target", help="GPU: sm_80 ... sm_120, gfx90a ... gfx1201.")],
    signature: Annotated[
        str | None, typer.Option("--signature", help="Only this one of the kernel's signatures.")
    ] = None,
    asm: Annotated[
        Assembly | None,
        typer.Option("--asm", help="Print this text instead (of the first signature if none is named)."),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Compile a kernel here for a target and show its machine code.

    A line per signature and kernel that it starts: block sizes, warps and stages; registers and spilled
    bytes of a thread; shared memory of a program; warps that fit on a multiprocessor; instructions.
    """
    kernels = _kernels()
    from halimede.kernels.target import TARGETS

    spec = kernels[_known("kernel", kernel, kernels)]
    architecture = TARGETS[_known("target", target, TARGETS)]
    cases = {case.name: case for case in spec.signatures}
    if signature is not None:
        cases = {signature: cases[_known(f"signature of {kernel}", signature, cases)]}
    elif asm is not None:
        cases = dict([next(iter(cases.items()))])
    if asm is not None:
        _print_assembly(spec, cases.values(), architecture.name, asm)
        return
    found = list(_inspect(spec, cases.values(), architecture.name))
    if as_json:
        print(json.dumps([_as_json(*entry) for entry in found], indent=2, ensure_ascii=False))
        return
    print_rows(_COLUMNS, [_row(*entry) for entry in found])
    if sys.stdout.isatty():
        print("16-byte accesses/all accesses; shared memory and spills in bytes.")


def _kernels() -> "dict[str, KernelSpec]":
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise KernelError(
            f"the kernels need Triton, which cannot be imported ({error}); pip install triton (Linux only)"
        ) from error
    from halimede.kernels.spec import all_kernels

    return dict(all_kernels())


def _known(kind: str, name: str, names: Collection[str]) -> str:
    if name in names:
        return name
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    remedy = f"did you mean {close[0]!r}? " if close else ""
    raise KernelError(f"{kind} {name!r} is unknown; {remedy}There are: {'; '.join(names)}")


def _compile(spec: "KernelSpec", case: "Case", target: str) -> "list[Build]":
    from halimede.kernels.compile import compile_case
    from halimede.kernels.target import TARGETS

    return compile_case(spec, case, TARGETS[target])


def _inspect(
    spec: "KernelSpec", cases: "Collection[Case]", target: str
) -> "Iterator[tuple[Case, Build, MachineCode]]":
    from halimede.kernels.inspect import inspect_build

    for case in cases:
        for build in _compile(spec, case, target):
            yield case, build, inspect_build(build)


def _print_assembly(spec: "KernelSpec", cases: "Collection[Case]", target: str, asm: Assembly) -> None:
    from halimede.kernels.inspect import sass

    for case in cases:
        for build in _compile(spec, case, target):
            texts = build.compiled.asm
            needed = "cubin" if asm is Assembly.SASS else asm.value
            if needed not in texts:
                raise KernelError(f"there is no {asm} for {target}; it has: {', '.join(_texts(texts))}")
            print(f"// {build.name} of {spec.name}, {case.name}, {target}")
            print(sass(build) if asm is Assembly.SASS else texts[asm.value])


def _texts(compiled: Collection[str]) -> list[str]:
    return [asm for asm in Assembly if ("cubin" if asm is Assembly.SASS else asm.value) in compiled]


def _as_json(case: "Case", build: "Build", code: "MachineCode") -> dict[str, Any]:
    return {
        "signature": case.name,
        "blocks": dict(build.config.blocks),
        **asdict(code),
        "occupancy": round(code.occupancy, 3),
    }


_COLUMNS = (
    "Signature",
    "Kernel",
    "Blocks",
    "Warps x stages",
    "Registers",
    "Spilled",
    "Shared",
    "Resident warps",
    "Instructions",
    "Of these",
)


def _row(case: "Case", build: "Build", code: "MachineCode") -> tuple[str, ...]:
    return (
        case.name,
        code.kernel.removeprefix("_").removesuffix("_kernel"),
        " ".join(f"{name}={size}" for name, size in build.config.blocks.items()),
        f"{code.num_warps} x {code.num_stages}",
        str(code.registers),
        str(code.spill_bytes),
        str(code.shared_bytes),
        f"{code.warps}/{code.max_warps}",
        str(code.instructions),
        _mix(code),
    )


def _mix(code: "MachineCode") -> str:
    """Kinds that occur; of loads and stores those of 16 bytes out of all."""
    parts = []
    for name, count in code.mix.items():
        if count and not name.endswith("_128"):
            wide = code.mix.get(f"{name}_128")
            parts.append(f"{name} {count if wide is None else f'{wide}/{count}'}")
    return ", ".join(parts).replace("_", " ")


register(app)  # at the end: `--help` lists commands in this order
