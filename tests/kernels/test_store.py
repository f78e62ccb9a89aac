"""The kernel cache on disk: damage is found and named, and many processes may use it at once."""

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kernel_entries import TRITON, files_of, filled, kernel, write_many

from halimede.errors import CorruptKernelError, KernelCacheError
from halimede.kernels import atomic_file
from halimede.kernels.cache_dir import default_kernel_cache_dir
from halimede.kernels.store import KernelStore
from halimede.kernels.store_entry import read_manifest, write_manifest


@pytest.fixture
def store(tmp_path: Path) -> KernelStore:
    return filled(tmp_path / "cache", 0)


def only(store: KernelStore, ending: str) -> Path:
    (path,) = store.root.rglob(f"*{ending}")
    return path


def read_first(store: KernelStore) -> Any:
    return store.read(TRITON, "sm_90", kernel()[0].key)


def broken(store: KernelStore) -> list[Path]:
    return [problem.path for problem in store.verify() if not problem.leftover]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    store = KernelStore(tmp_path / "not" / "there")
    assert read_first(store) is None
    assert store.keys(TRITON, "sm_90") == frozenset()
    assert store.verify() == list(store.entries()) == []
    for target, ending in (("sm_90", "cubin"), ("gfx942", "hsaco")):
        entry, binary = kernel(1, target=target)
        store.write(entry, binary)
        assert store.read(TRITON, target, entry.key) == (entry, binary)
        assert store.keys(TRITON, target) == {entry.key}
        folder = tmp_path / "not/there/v1" / TRITON / target
        assert {p.name for p in folder.iterdir()} == {f"{entry.key}.json", f"{entry.sha256[:32]}.{ending}"}
    assert store.verify() == []


def test_entries_are_sorted_and_corrupt_ones_left_out(store: KernelStore) -> None:
    for number, target in ((3, "sm_90"), (1, "sm_90"), (2, "gfx942")):
        store.write(*kernel(number, target=target))
    (store.root / TRITON / "sm_90" / f"{kernel(3)[0].key}.json").write_text("{}")
    found = [(entry.target, entry.entry_point) for entry in store.entries()]
    assert found == [("gfx942", "_norm_2_kernel"), ("sm_90", "_norm_0_kernel"), ("sm_90", "_norm_1_kernel")]


def test_the_files_hang_on_the_kernels_only(tmp_path: Path) -> None:
    one, other = filled(tmp_path / "one", 1, 2, 3), filled(tmp_path / "other", 3, 2, 1, 2)
    assert files_of(one.folder) == files_of(other.folder)
    text = "".join(p.read_text() for p in one.root.rglob("*.json"))
    assert "tmp" not in text
    assert text.startswith('{\n  "constants": {')


def test_a_copy_elsewhere_is_the_same_cache(store: KernelStore, tmp_path: Path) -> None:
    shutil.copytree(store.folder, tmp_path / "elsewhere")
    before = read_first(store)
    shutil.rmtree(store.folder)
    moved = KernelStore(tmp_path / "elsewhere")
    assert read_first(moved) == before
    assert moved.verify() == []


@pytest.mark.parametrize("ending", [".json", ".cubin"])
def test_a_flipped_bit_is_found_and_named_and_mended(store: KernelStore, ending: str) -> None:
    path = only(store, ending)
    good = path.read_bytes()
    for place in (*range(0, len(good), max(1, len(good) // 40)), len(good) - 1):
        for bit in (0, 3, 7):
            path.write_bytes(good[:place] + bytes([good[place] ^ (1 << bit)]) + good[place + 1 :])
            with pytest.raises(CorruptKernelError) as error:
                read_first(store)
            assert error.value.path == str(path)
            assert broken(store) == [path]
    store.write(*kernel())
    assert path.read_bytes() == good


@pytest.mark.parametrize("ending", [".json", ".cubin"])
def test_a_truncated_file_is_found(store: KernelStore, ending: str) -> None:
    path = only(store, ending)
    good = path.read_bytes()
    for length in (0, 1, len(good) // 2, len(good) - 2):
        path.write_bytes(good[:length])
        with pytest.raises(CorruptKernelError, match=path.name):
            read_first(store)
        assert broken(store) == [path]
    path.write_bytes(good + b"x")
    assert broken(store) == [path]


def test_a_missing_binary_is_named(store: KernelStore) -> None:
    path = only(store, ".cubin")
    path.unlink()
    with pytest.raises(CorruptKernelError, match=f"{path.name} is missing.*halimede warmup") as error:
        read_first(store)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    assert broken(store) == [path]


def test_a_manifest_of_another_kernel_is_found(store: KernelStore) -> None:
    mine = only(store, ".json")
    for stranger in (kernel(1), kernel(target="gfx942"), kernel(triton="3.9.0")):
        mine.write_bytes(write_manifest(stranger[0]))
        with pytest.raises(CorruptKernelError, match="is the manifest of another kernel"):
            read_first(store)
        assert list(store.entries()) == []
    assert broken(store) == [mine]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"registers": NaN, "digest": ""}', "is not JSON"),
        ('["digest"]', "has no digest"),
        ("{}", "has no digest"),
    ],
)
def test_what_is_no_manifest_is_told(store: KernelStore, text: str, said: str) -> None:
    only(store, ".json").write_text(text)
    with pytest.raises(CorruptKernelError, match=said):
        read_first(store)


def with_digest(**changes: Any) -> bytes:
    """The manifest with other fields and the digest that they have."""
    from halimede.kernels.store_entry import _digest

    values = {**kernel()[0].as_json(), **changes}
    values = {name: value for name, value in values.items() if value != "absent"}
    return json.dumps({**values, "digest": _digest(values)}).encode()


def test_fields_of_later_versions_are_left_out() -> None:
    assert read_manifest(with_digest(made_by="a later version")) == kernel()[0]


def test_manifests_of_before_there_was_scratch_memory_ask_for_none() -> None:
    old = read_manifest(with_digest(scratch_bytes="absent", scratch_align="absent"))
    assert old == kernel(scratch_bytes=0, scratch_align=1)[0]
    new = kernel(scratch_bytes=256, scratch_align=128)[0]
    assert read_manifest(write_manifest(new)) == new
    with pytest.raises(ValueError, match="scratch_bytes='256'"):
        read_manifest(with_digest(scratch_bytes="256"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"registers": "absent"}, "lacks the field 'registers'"),
        ({"registers": "32"}, "registers='32'"),
        ({"registers": True}, "registers=True"),
        ({"signature": []}, "signature="),
        ({"sha256": "../../../../etc/passwd"}, "sha256="),
        ({"target": ".."}, "target="),
        ({"triton": "../3.6.0"}, "triton="),
        ({"kernel": "\x1b]0;title\x07"}, "kernel="),
    ],
)
def test_fields_that_do_not_fit_are_told(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_manifest(with_digest(**changes))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"size": 1}, "is not that of its manifest"),
        ({"sha256": "0" * 64}, "is not that of its manifest"),
        ({"target": "../sm_90"}, "target='../sm_90'"),
        ({"key": "x"}, "key='x'"),
        ({"constants": {"SCALE": float("inf")}}, "'SCALE': inf in its constants"),
        ({"options": {"libs": ["a"]}}, "no scalar"),
    ],
)
def test_what_does_not_fit_is_not_written(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    entry, binary = kernel()
    with pytest.raises(KernelCacheError, match=said):
        KernelStore(tmp_path).write(replace(entry, **fields), binary)
    assert files_of(tmp_path) == {}


def test_names_cannot_leave_the_folder(store: KernelStore) -> None:
    good = "0" * 32
    for triton, target, key in (("..", "sm_90", good), (TRITON, "..", good), (TRITON, "sm_90", "../x")):
        with pytest.raises(KernelCacheError, match="is not"):
            store.read(triton, target, key)
        with pytest.raises(KernelCacheError, match="is not"):
            store.remove(triton, target, key)


def test_remove_leaves_the_binary_that_another_kernel_shares(store: KernelStore) -> None:
    first, binary = kernel()
    second = replace(first, key="f" * 32)
    store.write(second, binary)
    assert store.remove(TRITON, "sm_90", first.key)
    assert not store.remove(TRITON, "sm_90", first.key)
    assert store.read(TRITON, "sm_90", second.key) == (second, binary)
    store.remove(TRITON, "sm_90", second.key)
    (left,) = store.verify()
    assert (left.path, left.leftover) == (only(store, ".cubin"), True)


def test_processes_that_write_at_once_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_many, args=(str(tmp_path), 100 * number, 8)) for number in (1, 2)]
    for writer in writers:
        writer.start()
    store, seen = KernelStore(tmp_path), 0
    while any(writer.is_alive() for writer in writers):
        for key in store.keys(TRITON, "sm_90"):
            assert store.read(TRITON, "sm_90", key) is not None
            seen += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(store.keys(TRITON, "sm_90")) == 30
    assert store.verify() == []
    assert seen


def test_a_killed_writer_leaves_nothing_broken(tmp_path: Path) -> None:
    code = f"from kernel_entries import write_many; write_many({str(tmp_path)!r}, 100, 10**9)"
    store = KernelStore(tmp_path)
    for delay in (0.0, 0.002, 0.005, 0.011):
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        writer = subprocess.Popen([sys.executable, "-c", code], env=environment)
        before = time.monotonic()
        while not list(store.entries()) and time.monotonic() < before + 20:
            time.sleep(0.001)
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        keys = store.keys(TRITON, "sm_90")
        assert keys
        for key in keys:
            assert store.read(TRITON, "sm_90", key) is not None
        assert broken(store) == []
        shutil.rmtree(store.root)


class FullDisk:
    """A file of which only the first bytes fit."""

    def __init__(self, path: Path, mode: str) -> None:
        self._file = path.open(mode)

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        self._file.write(data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("fits", [0, 1])
def test_a_full_disk_leaves_what_was_there(
    store: KernelStore, monkeypatch: pytest.MonkeyPatch, fits: int
) -> None:
    before = files_of(store.folder)
    rebuilt = kernel(0, binary=b"other code")
    for entry, binary in (rebuilt, kernel(1), kernel(2, target="gfx942")):
        files = iter([open] * fits)
        monkeypatch.setattr(
            atomic_file, "open", lambda *a, files=files: next(files, FullDisk)(*a), raising=False
        )
        with pytest.raises(OSError, match="No space left"):
            store.write(entry, binary)
    monkeypatch.undo()
    after = files_of(store.folder)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 3 * fits  # binaries that came before their manifests
    assert read_first(store) == kernel()
    assert broken(store) == []


def mounted(kind: str, options: str, source: Path | str, at: Path) -> bool:
    done = subprocess.run(["mount", *kind.split(), "-o", options, str(source), str(at)], capture_output=True)
    return done.returncode == 0


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("mount") is None, reason="only root may mount")
def test_a_file_system_that_is_really_full(tmp_path: Path) -> None:
    if not mounted("-t tmpfs", "size=64k", "none", tmp_path):
        pytest.skip("this container may not mount")
    try:
        store = filled(tmp_path, 0)
        with pytest.raises(OSError) as error:
            store.write(*kernel(1, binary=bytes(1 << 17)))
        assert error.value.errno == errno.ENOSPC
        assert store.verify() == []
        assert read_first(store) == kernel()
        store.write(*kernel(2))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("mount") is None, reason="only root may mount")
def test_a_read_only_folder_is_read_and_not_written(store: KernelStore, tmp_path: Path) -> None:
    view = tmp_path / "view"
    view.mkdir()
    if not mounted("--bind", "ro", store.folder, view):
        pytest.skip("this container may not mount")
    try:
        if not mounted("--bind", "remount,ro", store.folder, view):
            pytest.skip("this container may not mount read-only")
        read_only = KernelStore(view)
        assert read_first(read_only) == kernel()
        with pytest.raises(OSError) as error:
            read_only.write(*kernel(1))
        assert error.value.errno == errno.EROFS
    finally:
        subprocess.run(["umount", str(view)], check=True)


def test_files_from_the_future_are_as_good(store: KernelStore) -> None:
    for path in store.root.rglob("*.*"):
        os.utime(path, (time.time() + 1e8,) * 2)
    assert read_first(store) == kernel()
    assert store.verify() == []


def test_a_folder_that_is_removed_while_it_is_empty(
    store: KernelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Path.mkdir, []

    def mkdir_and_lose_it(path: Path, *args: Any, **options: Any) -> None:
        real(path, *args, **options)
        calls.append(path)
        if len(calls) == 1:
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", mkdir_and_lose_it)
    store.write(*kernel(5, target="gfx942"))
    assert store.verify() == []


def test_other_files_in_the_folder_are_no_ones_business(store: KernelStore) -> None:
    folder = store.root / TRITON / "sm_90"
    for name in ("README", "x.json", "../sm90", "../../notes.txt"):
        (folder / name).write_text("mine")
    (store.root / "-").mkdir()
    assert store.verify() == []
    assert store.keys(TRITON, "sm_90") == {kernel()[0].key}


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.delenv("HALIMEDE_KERNEL_CACHE", raising=False)
    assert default_kernel_cache_dir() == tmp_path / ".cache/halimede/kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_kernel_cache_dir() == Path("/caches/halimede/kernels")
    monkeypatch.setenv("HALIMEDE_KERNEL_CACHE", "~/mine")
    assert default_kernel_cache_dir() == tmp_path / "mine"

    def no_home(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HALIMEDE_KERNEL_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(KernelCacheError, match="set HALIMEDE_KERNEL_CACHE"):
        default_kernel_cache_dir()


def test_the_cache_needs_neither_torch_nor_triton() -> None:
    code = "import sys, halimede.kernels.archive, halimede.kernels.prune; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "triton", "numpy", "zstandard"} & set(done.stdout.split())
