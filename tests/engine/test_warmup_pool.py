"""Building many kernels: what is built, what is not, and that nothing that was built is lost."""

import errno
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cheap_kernels import cheap, deadly, four, refused

from halimede.engine.warmup import pool
from halimede.engine.warmup.pool import Outcome, Summary, Task, build_all
from halimede.errors import KernelCacheError, KernelError
from halimede.kernels.build import build
from halimede.kernels.specialise import TRITON_VERSION, Specialisation
from halimede.kernels.store import KernelStore


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()
    }


def manifest(store: KernelStore, one: Specialisation) -> Path:
    return store.root / TRITON_VERSION / one.target.machine / f"{one.key}.json"


def binary(store: KernelStore, one: Specialisation) -> Path:
    found = store.read(TRITON_VERSION, one.target.machine, one.key)
    assert found is not None
    return manifest(store, one).with_name(found[0].binary_name)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> KernelStore:
    """The four, built in a run that was interrupted after two of them and went on."""
    store = KernelStore(tmp_path_factory.mktemp("cache"))
    done: list[Outcome] = []

    def interrupt(outcome: Outcome) -> None:
        done.append(outcome)
        if len(done) == 2:
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        build_all(four(), store, jobs=1, on_done=interrupt)
    assert time.monotonic() - start < 60
    assert len(list(store.entries())) == 2
    summary = build_all(four(), store, jobs=1)
    assert (summary.compiled, summary.cached, summary.failed) == (2, 2, [])
    return store


@pytest.fixture
def store(built: KernelStore, tmp_path: Path) -> KernelStore:
    shutil.copytree(built.folder, tmp_path / "cache")
    return KernelStore(tmp_path / "cache")


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: object) -> None:
        raise AssertionError("a process is started")

    monkeypatch.setattr(pool.Workers, "_start", start)


@pytest.mark.usefixtures("no_processes")
def test_a_second_run_compiles_nothing(store: KernelStore) -> None:
    before = files(store.folder)
    for path in store.folder.rglob("*"):  # a clock that was wrong
        os.utime(path, (time.time() + 1e9,) * 2)
    asked: list[int] = []
    summary = build_all(four(), store, jobs=2, on_start=lambda missing: asked.append(len(missing)))
    assert (summary.compiled, summary.cached, summary.failed, asked) == (0, 4, [], [0])
    assert summary.bytes == sum(entry.size for entry in store.entries()) > 0
    assert summary.seconds < 1
    assert files(store.folder) == before


def test_another_process_makes_the_same_of_a_task(built: KernelStore) -> None:
    """The manifests were written by other processes, which know the tasks only."""
    for one in four():
        entry, code = build(one)
        assert built.read(TRITON_VERSION, one.target.machine, one.key) == (entry, code)
        assert Task.of(one).specialisation().key == one.key


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_two_runs_at_once_repair_what_is_corrupt(built: KernelStore, store: KernelStore) -> None:
    ones = four()
    broken: list[tuple[Callable[[Path], object], Path]] = [
        (_flip, manifest(store, ones[0])),
        (_flip, binary(store, ones[1])),
        (_truncate, binary(store, ones[2])),
        (Path.unlink, binary(store, ones[3])),
    ]
    for damage, path in broken:
        damage(path)
    assert sum(not problem.leftover for problem in store.verify()) == 4
    summaries: list[Summary] = []
    threads = [
        threading.Thread(target=lambda: summaries.append(build_all(four(), store, jobs=1))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [summary.compiled + summary.cached for summary in summaries] == [4, 4]
    assert max(summary.compiled for summary in summaries) == 4
    assert store.verify() == []
    assert files(store.folder) == files(built.folder)


def test_what_cannot_be_built_stops_nothing_else(store: KernelStore) -> None:
    bad, good = [refused(), deadly()], [cheap(scale=3.0), cheap(scale=4.0)]
    missing: list[str] = []
    outcomes: dict[str, Outcome] = {}

    def done(outcome: Outcome) -> None:
        outcomes[outcome.specialisation.key] = outcome

    summary = build_all(
        [*bad, *good, *four()],
        store,
        jobs=2,
        on_start=lambda ones: missing.extend(one.key for one in ones),
        on_done=done,
    )
    assert missing == [one.key for one in (*bad, *good)]
    assert (summary.compiled, summary.cached) == (2, 4)
    failed = {one.key: error for one, error in summary.failed}
    assert failed.keys() == {one.key for one in bad}
    assert "cheap_kernels:_refused_kernel cannot be compiled for sm_90 by Triton" in failed[bad[0].key]
    assert "there are seven of them" in failed[bad[0].key]
    assert failed[bad[1].key] == (
        "the compiler's process was ended by SIGABRT: LLVM ERROR: Cannot select: a test"
    )
    assert outcomes.keys() == set(missing)
    assert all(outcomes[one.key].seconds > 0 and outcomes[one.key].size > 0 for one in good)
    assert summary.bytes == sum(entry.size for entry in store.entries())
    assert len(list(store.entries())) == 6
    assert store.verify() == []


@pytest.mark.usefixtures("no_processes")
def test_a_folder_that_cannot_be_written_is_told_first(store: KernelStore, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    blocked = KernelStore(tmp_path / "file" / "cache")
    with pytest.raises(KernelCacheError) as error:
        build_all(four(), blocked, jobs=1)
    assert str(error.value) == (
        f"the kernel cache {blocked.folder} cannot be written ([Errno {errno.ENOTDIR}] Not a directory: "
        f"'{blocked.root}'); free space there or choose another with -o, and run again: 0 of 4 kernels are "
        "there and are kept"
    )
    with mounted(store.folder, "bind"):
        subprocess.run(["mount", "-o", "remount,ro,bind", store.folder], check=True)
        assert build_all(four(), store, jobs=1).cached == 4  # nothing to write
        with pytest.raises(KernelCacheError, match=r"no right to write .* 4 of 5 kernels are there"):
            build_all([*four(), cheap(scale=5.0)], store, jobs=1)


class mounted:
    """A mount inside of `with`; the test is skipped where that is not allowed."""

    def __init__(self, folder: Path, kind: str) -> None:
        bind = ["--bind", str(folder), str(folder)]
        command = bind if kind == "bind" else ["-t", "tmpfs", "-o", kind, "tmpfs", str(folder)]
        self._folder = folder
        self._mount = ["mount", *command]

    def __enter__(self) -> None:
        try:
            subprocess.run(self._mount, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"nothing can be mounted here ({error})")

    def __exit__(self, *error: object) -> None:
        subprocess.run(["umount", self._folder], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """With room for about two of the kernels."""
    with mounted(tmp_path, "size=32k"):
        yield tmp_path


def test_a_full_disk_is_one_error_and_what_was_built_is_kept(small_disk: Path) -> None:
    store = KernelStore(small_disk / "cache")
    ones = [cheap(scale=float(n)) for n in range(2, 12)]
    with pytest.raises(KernelCacheError, match="No space left on device") as error:
        build_all(ones, store, jobs=1)
    kept = len(list(store.entries()))
    assert 0 < kept < len(ones)
    assert f"run again: {kept} of 10 kernels are there and are kept" in str(error.value)
    assert [problem for problem in store.verify() if not problem.leftover] == []


def test_a_full_disk_for_temporary_files_is_not_the_kernels_fault(
    store: KernelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(one: Specialisation) -> None:
        raise KernelError("cannot be compiled") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pool, "build", full)
    answer = pool._build_one(store.folder, ("key", Task.of(cheap())))
    assert answer.obstacle == (
        "the compiler's temporary files cannot be written ([Errno 28] No space left on device); free space "
        "there or set TMPDIR to another folder"
    )
