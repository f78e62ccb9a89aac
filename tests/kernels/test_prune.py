"""Pruning the kernel cache: what is useless goes, what others may need or own stays."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from kernel_entries import TRITON, files_of, filled, kernel

from halimede.kernels import prune as prune_module
from halimede.kernels.prune import prune
from halimede.kernels.store import KernelStore

HOUR = 3600
TEMPORARY = "tmp-0123456789abcdef"


@pytest.fixture
def store(tmp_path: Path) -> KernelStore:
    return filled(tmp_path / "cache", 0, 1, 2)


def keep(*_: object) -> bool:
    return True


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def age_all(store: KernelStore, seconds: float = 2 * HOUR) -> None:
    for path in store.folder.rglob("*"):
        age(path, seconds)


def test_a_cache_that_is_current_stays(store: KernelStore) -> None:
    age_all(store)
    before = files_of(store.folder)
    pruned = prune(store, keep)
    assert (pruned.removed, pruned.bytes) == ((), 0)
    assert files_of(store.folder) == before


def test_nothing_there_is_nothing_to_do(tmp_path: Path) -> None:
    assert prune(KernelStore(tmp_path / "absent"), keep).removed == ()
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("dry_run", [True, False])
def test_kernels_that_are_not_current_go_with_their_binaries(store: KernelStore, dry_run: bool) -> None:
    age_all(store)
    before, folder = files_of(store.folder), store.root / TRITON / "sm_90"
    stale = kernel(1)[0]
    pruned = prune(store, lambda entry: entry.key != stale.key, dry_run=dry_run)
    gone = [folder / stale.manifest_name, folder / stale.binary_name]
    assert list(pruned.removed) == gone
    assert pruned.bytes == sum(len(before[str(path.relative_to(store.folder))]) for path in gone)
    assert len(files_of(store.folder)) == (6 if dry_run else 4)
    assert store.verify() == []


def test_a_binary_that_another_kernel_shares_stays(store: KernelStore) -> None:
    entry, binary = kernel(1)
    store.write(replace(entry, key="f" * 32), binary)
    age_all(store)
    assert [p.name for p in prune(store, lambda e: e.key != entry.key).removed] == [entry.manifest_name]
    assert store.verify() == []


@pytest.mark.parametrize(
    ("seconds", "goes"),
    [
        (0, False),
        (HOUR - 60, False),
        (HOUR + 60, True),
        (-HOUR + 60, False),
        (-HOUR - 60, True),
        (-1e8, True),
    ],
)
def test_leftovers_go_when_no_writer_can_need_them(store: KernelStore, seconds: float, goes: bool) -> None:
    folder = store.root / TRITON / "sm_90"
    leftovers = [store.folder / TEMPORARY, folder / TEMPORARY, folder / kernel(1)[0].binary_name]
    (folder / kernel(1)[0].manifest_name).unlink()
    for path in leftovers:
        path.touch()
        age(path, seconds)
    removed = prune(store, keep).removed
    assert set(removed) == (set(leftovers) if goes else set())
    assert all(path.exists() != goes for path in leftovers)
    assert not [p for p in store.verify() if not p.leftover]


def test_the_clock_of_the_file_system_counts(store: KernelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store.root / TRITON / "sm_90" / TEMPORARY
    path.touch()
    monkeypatch.setattr(prune_module.time, "time", lambda: 0.0)  # this machine's is wrong
    assert prune(store, keep).removed == ()
    age(path, -2 * HOUR)
    assert prune(store, keep).removed == (path,)
    assert [p.name for p in store.folder.iterdir()] == ["v1"]


def test_corrupt_kernels_go(store: KernelStore) -> None:
    folder = store.root / TRITON / "sm_90"
    torn, lonely = kernel(0)[0], kernel(1)[0]
    (folder / torn.manifest_name).write_text("{")
    (folder / lonely.binary_name).unlink()
    age(folder / torn.binary_name, 2 * HOUR)
    removed = {path.name for path in prune(store, keep).removed}
    assert removed == {torn.manifest_name, lonely.manifest_name, torn.binary_name}
    assert store.verify() == []
    assert store.keys(TRITON, "sm_90") == {kernel(2)[0].key}


def test_other_formats_go_and_other_peoples_files_stay(store: KernelStore, tmp_path: Path) -> None:
    name, key = f"3.5.0/sm_90/{'0' * 32}.json", "0" * 32
    gone = [store.folder / format_ / name for format_ in ("v0", "v2", "v17")]
    strange = [
        store.folder / "v2/3.5.0/sm_90/notes.json",
        store.folder / f"v2/3.5.0/elsewhere/{key}.json",
        store.folder / f"v2/{key}.json",
        store.folder / f"vault/{name}",
        store.folder / f"V2/{name}",
        store.folder / f"v01/{name}",
        store.folder / "v3",  # a file
        store.folder / "README",
        store.root / TRITON / "sm_90" / "notes.txt",
        tmp_path / f"outside/{name}",
    ]
    for path in (*gone, *strange):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
        age(path, 2 * HOUR)
    (store.folder / "v9").symlink_to(tmp_path / "outside")
    folder = store.root / TRITON / "sm_90" / f"{key}.cubin"
    folder.mkdir()
    age(folder, 2 * HOUR)
    assert set(prune(store, keep).removed) == set(gone)
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in (*strange, folder))
    assert not (store.folder / "v0").exists()
    assert not (store.folder / "v17").exists()


def test_empty_folders_go_and_writers_make_them_again(store: KernelStore) -> None:
    age_all(store)
    assert len(prune(store, lambda entry: False).removed) == 6
    assert store.folder.is_dir()
    assert not store.root.exists()
    store.write(*kernel())
    assert store.verify() == []


def after_the_listing(store: KernelStore, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """`act` when it is decided what goes, before anything is gone."""
    real = prune_module._file_system_time

    def act_first(folder: Path) -> float:
        act()
        return real(folder)

    monkeypatch.setattr(prune_module, "_file_system_time", act_first)


def test_a_binary_that_a_writer_needs_again_stays(
    store: KernelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, binary = kernel(1)
    store.remove(TRITON, "sm_90", entry.key)
    age_all(store)
    after_the_listing(store, monkeypatch, lambda: store.write(entry, binary))
    assert prune(store, keep).removed == ()
    assert store.read(TRITON, "sm_90", entry.key) == (entry, binary)


def test_two_may_prune_at_once(store: KernelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    age_all(store)

    def the_other() -> None:
        monkeypatch.undo()
        prune(store, lambda entry: False)

    after_the_listing(store, monkeypatch, the_other)
    assert prune(store, lambda entry: False).removed == ()
    assert files_of(store.folder) == {}
