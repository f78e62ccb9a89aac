"""`halimede kernels`, the commands for the folder of compiled kernels. No GPU, torch or Triton is needed, but
for `prune`, which asks the installed kernels what is current.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halimede.engine.cli.table import print_rows
from halimede.errors import KernelCacheError, KernelError

if TYPE_CHECKING:
    from halimede.kernels.store import KernelStore
    from halimede.kernels.store_entry import KernelEntry

CacheDirectory = Annotated[
    Path | None,
    typer.Option(
        "--kernel-cache-dir",
        file_okay=False,
        help="Folder of the kernel cache. Default: HALIMEDE_KERNEL_CACHE, else halimede/kernels in "
        "XDG_CACHE_HOME, else in ~/.cache.",
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("verify", short_help="Check every file in the kernel cache.")(verify)
    app.command("pack", no_args_is_help=True, short_help="Put the kernel cache into one file.")(pack)
    app.command("unpack", no_args_is_help=True, short_help="Put an archive into the kernel cache.")(unpack)
    app.command("diff", no_args_is_help=True, short_help="Compare two kernel caches or archives.")(diff)
    app.command("prune", short_help="Remove from the kernel cache what cannot be used any more.")(prune)


def list_cached(kernel_cache_dir: Path | None, target: str | None, *, as_json: bool) -> None:
    """Print the manifests of the kernels in the cache, or those for a list of targets, "sm_90,gfx942".

    Raises KernelCacheError: there is no cache, or none of the kernels is for one of the targets.
    """
    store = _existing_store(kernel_cache_dir)
    entries = list(store.entries())
    if target is not None:
        targets = _targets(target)
        entries = [entry for entry in entries if entry.target in targets]
        if missing := targets - {entry.target for entry in entries}:
            raise KernelCacheError(
                f"{store.folder} has no kernels for {', '.join(sorted(missing))}; it has kernels for: "
                f"{', '.join(sorted({name for _, name in store.folders()})) or 'nothing'}"
            )
    if as_json:
        _print_json([entry.as_json() for entry in entries])
        return
    print_rows(_COLUMNS, [_row(entry) for entry in entries])


def verify(kernel_cache_dir: CacheDirectory = None, as_json: _Json = False) -> None:
    """Check every manifest and binary in the kernel cache against its digest.

    A line for each file that is altered, truncated or missing, and for each leftover, which breaks nothing.
    Exit status 1 if something is broken.
    """
    store = _existing_store(kernel_cache_dir)
    problems = store.verify()
    broken = sum(not problem.leftover for problem in problems)
    if as_json:
        _print_json([{**asdict(problem), "path": str(problem.path)} for problem in problems])
    else:
        for problem in problems:
            print(f"{'leftover' if problem.leftover else 'broken'}: {problem.path} {problem.fact}")
        total = sum(len(store.keys(*place)) for place in store.folders())
        leftovers = len(problems) - broken
        print(f"{store.folder}: {_count(total, 'kernel')}, {broken} broken, {_count(leftovers, 'leftover')}")
        if broken:
            print("Build them again with `halimede warmup`, or remove them with `halimede kernels prune`.")
    if broken:
        raise typer.Exit(1)


def pack(
    out: Annotated[Path, typer.Argument(help="File to write: .tar.zst, or .tar to leave it uncompressed.")],
    target: Annotated[
        str | None, typer.Option("--target", help="Only kernels for these: sm_90,gfx942.")
    ] = None,
    triton: Annotated[
        str | None, typer.Option("--triton", help="Only those made by this version of Triton.")
    ] = None,
    kernel_cache_dir: CacheDirectory = None,
    as_json: _Json = False,
) -> None:
    """Put the kernels in the cache into one file, for another machine's `halimede kernels unpack`.

    Prints the file's SHA-256, kernels and bytes. The same kernels give the same file. Corrupt kernels are
    named and nothing is written.
    """
    from halimede.kernels.archive import pack as pack_store

    targets = None if target is None else _targets(target)
    packed = pack_store(_existing_store(kernel_cache_dir), out, targets=targets, triton=triton)
    if as_json:
        _print_json({"path": str(out), **asdict(packed)})
        return
    print(f"sha256 {packed.sha256}")
    print(f"{out}: {_count(packed.entries, 'kernel')}, {packed.bytes:,} bytes")


def unpack(
    archive: Annotated[Path, typer.Argument(dir_okay=False, help="What `halimede kernels pack` wrote.")],
    sha256: Annotated[
        str | None, typer.Option("--sha256", help="Refuse the archive if its SHA-256 is not this.")
    ] = None,
    kernel_cache_dir: CacheDirectory = None,
    as_json: _Json = False,
) -> None:
    """Put the kernels of an archive into the cache, beside those that are there.

    The whole archive is checked first; if anything in it is wrong, nothing is written. Its kernels will run
    on the GPU: take archives only from whom you trust, or compare their SHA-256.
    """
    from halimede.kernels.archive import unpack as unpack_archive

    store = _store(kernel_cache_dir)
    unpacked = unpack_archive(archive, store, sha256=sha256)
    if as_json:
        _print_json({"folder": str(store.folder), **asdict(unpacked)})
        return
    print(f"{store.folder}: {_count(unpacked.new, 'kernel')} new, {unpacked.same} there already")


def diff(
    a: Annotated[Path, typer.Argument(help="A kernel cache's folder or an archive.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Another one.", show_default=False)],
    as_json: _Json = False,
) -> None:
    """Compare the kernels of two caches or archives.

    A line for each that only A has (-), only B has (+), or whose binary is another one (!). Exit status 1 if
    they differ.
    """
    from halimede.kernels.archive import diff as diff_kernels

    found = diff_kernels(a, b)
    if as_json:
        _print_json(
            {
                "only_a": [entry.as_json() for entry in found.only_a],
                "only_b": [entry.as_json() for entry in found.only_b],
                "changed": [{"a": old.as_json(), "b": new.as_json()} for old, new in found.changed],
            }
        )
    else:
        lines = [("-", entry) for entry in found.only_a] + [("+", entry) for entry in found.only_b]
        for sign, entry in lines + [("!", old) for old, _new in found.changed]:
            print(sign, entry.kernel, entry.target, f"triton {entry.triton}", entry.key)
    if found:
        raise typer.Exit(1)


def prune(
    all_triton_versions: Annotated[
        bool, typer.Option("--all-triton-versions", help="Keep current kernels of other versions of Triton.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
    kernel_cache_dir: CacheDirectory = None,
    as_json: _Json = False,
) -> None:
    """Remove from the kernel cache what cannot be used any more.

    That is: kernels whose source has changed, of another version of Triton, of another format, or corrupt;
    and leftovers older than an hour. Files with names that are not the cache's are left alone.
    """
    from halimede.kernels.prune import prune as prune_store

    pruned = prune_store(_store(kernel_cache_dir), _is_current(all_triton_versions), dry_run=dry_run)
    if as_json:
        _print_json({"removed": [str(path) for path in pruned.removed], "bytes": pruned.bytes})
        return
    if dry_run:
        for path in pruned.removed:
            print(path)
    did = "would remove" if dry_run else "removed"
    print(f"{did} {_count(len(pruned.removed), 'file')}, {pruned.bytes:,} bytes")


_COLUMNS = ("Kernel", "Target", "Triton", "Registers", "Spilled", "Shared", "Size", "Key")


def _row(entry: "KernelEntry") -> tuple[str, ...]:
    numbers = (entry.registers, entry.spills, entry.shared_memory, entry.size)
    return (entry.kernel, entry.target, entry.triton, *map(str, numbers), entry.key)


def _store(folder: Path | None) -> "KernelStore":
    from halimede.kernels.cache_dir import default_kernel_cache_dir
    from halimede.kernels.store import KernelStore

    return KernelStore(default_kernel_cache_dir() if folder is None else folder)


def _existing_store(folder: Path | None) -> "KernelStore":
    store = _store(folder)
    if not store.folder.is_dir():
        raise KernelCacheError(
            f"there is no kernel cache in {store.folder}; fill one with `halimede warmup` or `halimede "
            "kernels unpack`, or name another with --kernel-cache-dir"
        )
    return store


def _targets(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in text.split(",") if name.strip())


def _is_current(all_triton_versions: bool) -> "Callable[[KernelEntry], bool]":
    try:
        from halimede.kernels.specialise import TRITON_VERSION, current_sources
    except ImportError as error:
        raise KernelError(
            f"what is current only Triton can tell, and it cannot be imported ({error}); "
            "pip install triton (Linux only)"
        ) from error
    sources = current_sources()

    def is_current(entry: "KernelEntry") -> bool:
        same_triton = all_triton_versions or entry.triton == TRITON_VERSION
        return same_triton and sources.get(entry.kernel) == entry.source

    return is_current


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _print_json(value: dict[str, Any] | Iterable[Any]) -> None:
    print(json.dumps(value, indent=2))  # names from elsewhere stay ASCII: harmless on a terminal
