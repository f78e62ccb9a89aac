"""`halimede kernels`: the commands for the folder of compiled kernels."""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from halimede.engine.cli.main import main
from halimede.kernels.store import KernelStore
from halimede.kernels.store_entry import KernelEntry

SOURCE = hashlib.sha256(b"source").hexdigest()

Run = Callable[..., str]


def kernel(name: str, **fields: Any) -> tuple[KernelEntry, bytes]:
    binary = fields.pop("binary", f"code of {name} {fields}".encode())
    entry = KernelEntry(
        key=hashlib.sha256(name.encode()).hexdigest()[:32],
        kernel=f"halimede.kernels.gpu.norm:{name}",
        target="sm_90",
        signature={"x_ptr": "*bf16:16"},
        constants={"BLOCK": 1024},
        options={"num_warps": 4},
        triton="3.6.0",
        source=SOURCE,
        entry_point=name,
        threads=128,
        shared_memory=4096,
        registers=37,
        spills=8,
        sha256=hashlib.sha256(binary).hexdigest(),
        size=len(binary),
    )
    return replace(entry, **fields), binary


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KernelStore:
    monkeypatch.setenv("HALIMEDE_KERNEL_CACHE", str(tmp_path / "cache"))
    store = KernelStore(tmp_path / "cache")
    store.write(*kernel("_norm"))
    store.write(*kernel("_rope"))
    store.write(*kernel("_norm", target="gfx942"))
    return store


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that ends with `status`; what it printed."""

    def run(*arguments: object, status: int = 0) -> str:
        with pytest.raises(SystemExit) as end:
            main(["kernels", *map(str, arguments)])
        printed = capsys.readouterr()
        assert end.value.code == status, printed
        return printed.out + printed.err

    return run


def test_cached_kernels_are_listed(store: KernelStore, run: Run) -> None:
    lines = [line.split("\t") for line in run("list", "--cached").splitlines()]
    assert [line[:2] for line in lines] == [
        ["halimede.kernels.gpu.norm:_norm", "gfx942"],
        ["halimede.kernels.gpu.norm:_norm", "sm_90"],
        ["halimede.kernels.gpu.norm:_rope", "sm_90"],
    ]
    entry = kernel("_norm")[0]
    assert lines[1][2:] == ["3.6.0", "37", "8", "4096", str(entry.size), entry.key]
    assert len(run("list", "--cached", "--target", "sm_90").splitlines()) == 2
    (listed,) = json.loads(run("list", "--cached", "--target", "gfx942", "--json"))
    assert KernelEntry(**listed) == kernel("_norm", target="gfx942")[0]


def test_what_cannot_be_listed_is_told(store: KernelStore, run: Run, tmp_path: Path) -> None:
    said = run("list", "--cached", "--target", "sm_90,sm_100", status=1)
    assert "no kernels for sm_100; it has kernels for: gfx942, sm_90" in said
    said = run("list", "--cached", "--kernel-cache-dir", tmp_path / "absent", status=1)
    assert "there is no kernel cache in" in said
    assert "halimede warmup" in said
    assert "are for --cached" in " ".join(run("list", "--target", "sm_90", status=2).split())


def test_a_terminal_gets_a_table(store: KernelStore, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    text = re.sub(r"\x1b\[[\d;]*m", "", run("list", "--cached"))
    assert "Registers" in text
    assert max(map(len, text.splitlines())) <= 120


def test_verify_names_what_is_broken(store: KernelStore, run: Run) -> None:
    assert run("verify") == f"{store.folder}: 3 kernels, 0 broken, 0 leftovers\n"
    assert json.loads(run("verify", "--json")) == []
    path = next(store.root.rglob("*.hsaco"))
    path.write_bytes(b"torn")
    left = path.with_name("tmp-0123456789abcdef")
    left.touch()
    said = run("verify", status=1)
    assert f"broken: {path} has 4 bytes" in said
    assert f"leftover: {left} is a file that is being written" in said
    assert "3 kernels, 1 broken, 1 leftover\n" in said
    assert "halimede kernels prune" in said
    found = json.loads(run("verify", "--json", status=1))
    assert [(entry["path"], entry["leftover"]) for entry in found] == [(str(path), False), (str(left), True)]
    path.unlink()
    store.remove("3.6.0", "gfx942", kernel("_norm")[0].key)
    assert "0 broken, 1 leftover\n" in run("verify")


def test_pack_and_unpack(store: KernelStore, run: Run, tmp_path: Path) -> None:
    out, there = tmp_path / "kernels.tar.zst", tmp_path / "there"
    said = run("pack", out, "--target", "sm_90, gfx942", "--triton", "3.6.0")
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert said == f"sha256 {digest}\n{out}: 3 kernels, {out.stat().st_size:,} bytes\n"
    assert "has the SHA-256" in run("unpack", out, "--sha256", "0" * 64, status=1)
    said = run("unpack", out, "--sha256", digest, "--kernel-cache-dir", there)
    assert said == f"{there}: 3 kernels new, 0 there already\n"
    unpacked = json.loads(run("unpack", out, "--kernel-cache-dir", there, "--json"))
    assert unpacked == {"folder": str(there), "new": 0, "same": 3}
    assert run("diff", store.folder, there) == run("diff", out, there) == ""
    packed = json.loads(run("pack", tmp_path / "one.tar", "--target", "gfx942", "--json"))
    assert packed["entries"] == 1
    assert packed["path"] == str(tmp_path / "one.tar")
    assert packed["bytes"] == (tmp_path / "one.tar").stat().st_size


def test_errors_are_short(store: KernelStore, run: Run, tmp_path: Path) -> None:
    for arguments, said in (
        (("pack", tmp_path / "x.zip"), "end it in .tar.zst or .tar"),
        (("pack", tmp_path / "x.tar", "--target", "sm_100"), "no such kernels to pack"),
        (("unpack", tmp_path / "absent.tar"), "does not exist"),
        (("diff", tmp_path / "absent", store.folder), "does not exist"),
    ):
        printed = run(*arguments, status=1)
        assert printed.startswith("error: ")
        assert said in printed
        assert printed.count("\n") == 1


def test_differences(store: KernelStore, run: Run, tmp_path: Path) -> None:
    other = KernelStore(tmp_path / "other")
    other.write(*kernel("_norm", binary=b"other code"))
    other.write(*kernel("_silu"))
    key = {name: kernel(name)[0].key for name in ("_norm", "_rope", "_silu")}
    name = "halimede.kernels.gpu.norm:"
    assert run("diff", store.folder, other.folder, status=1).splitlines() == [
        f"- {name}_norm gfx942 triton 3.6.0 {key['_norm']}",
        f"- {name}_rope sm_90 triton 3.6.0 {key['_rope']}",
        f"+ {name}_silu sm_90 triton 3.6.0 {key['_silu']}",
        f"! {name}_norm sm_90 triton 3.6.0 {key['_norm']}",
    ]
    found = json.loads(run("diff", store.folder, other.folder, "--json", status=1))
    assert [entry["key"] for entry in found["only_b"]] == [key["_silu"]]
    assert [pair["b"]["size"] for pair in found["changed"]] == [len(b"other code")]


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the installed kernels would say, without Triton: _norm and _old have sources, _rope is gone."""
    prefix = "halimede.kernels.gpu.norm:"
    known = {f"{prefix}_norm": SOURCE, f"{prefix}_old": "another"}
    module = SimpleNamespace(TRITON_VERSION="3.6.0", current_sources=lambda: known)
    monkeypatch.setitem(sys.modules, "halimede.kernels.specialise", module)


@pytest.mark.usefixtures("sources")
def test_prune_keeps_what_is_current(store: KernelStore, run: Run) -> None:
    store.write(*kernel("_norm", triton="3.9.0"))
    store.write(*kernel("_old"))
    shown = run("prune", "--dry-run", "--all-triton-versions")
    assert shown.count(".json") == 2
    assert "would remove 2 files, " in shown
    assert len(list(store.entries())) == 5
    found = json.loads(run("prune", "--all-triton-versions", "--json"))
    assert len(found["removed"]) == 2
    assert found["bytes"] > 0
    assert {(e.entry_point, e.target, e.triton) for e in store.entries()} == {
        ("_norm", "sm_90", "3.6.0"),
        ("_norm", "gfx942", "3.6.0"),
        ("_norm", "sm_90", "3.9.0"),
    }
    assert run("prune").startswith("removed 1 file, ")
    assert {e.triton for e in store.entries()} == {"3.6.0"}
    assert "0 broken, 3 leftovers" in run("verify")


def test_the_installed_kernels_say_what_is_current(store: KernelStore, run: Run) -> None:
    from halimede.kernels.specialise import TRITON_VERSION, current_sources

    name, source = next(iter(current_sources().items()))
    current = kernel("_current", kernel=name, source=source, triton=TRITON_VERSION)
    store.write(*current)
    run("prune")
    assert list(store.entries()) == [current[0]]


def test_prune_without_triton_tells_the_remedy(
    store: KernelStore, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "halimede.kernels.specialise", None)
    assert "pip install triton" in run("prune", status=1)
    assert len(list(store.entries())) == 3


def test_the_others_need_neither_torch_nor_triton(store: KernelStore, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['triton'] = None\n"
        "from halimede.engine.cli.main import main; main(['kernels', *sys.argv[1:]])"
    )
    out = str(tmp_path / "a.tar.zst")
    for arguments in (["pack", out], ["verify"], ["list", "--cached"], ["unpack", out], ["diff", out, out]):
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
