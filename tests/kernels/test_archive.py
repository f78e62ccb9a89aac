"""Kernels packed into one file: the same bytes for the same kernels, and nothing else is ever unpacked."""

import errno
import hashlib
import io
import os
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard
from kernel_entries import TRITON, files_of, filled, kernel

from halimede.errors import KernelCacheError
from halimede.kernels import archive, archive_tar
from halimede.kernels.archive import Unpacked, diff, pack, unpack
from halimede.kernels.store import KernelStore
from halimede.kernels.store_entry import write_manifest

Edit = Callable[[tarfile.TarInfo], None]


@pytest.fixture
def store(tmp_path: Path) -> KernelStore:
    store = filled(tmp_path / "cache", 0, 1, 2)
    store.write(*kernel(0, target="gfx942"))
    store.write(*kernel(0, triton="3.9.0"))
    return store


@pytest.fixture
def target(tmp_path: Path) -> KernelStore:
    return KernelStore(tmp_path / "target")


@pytest.mark.parametrize("name", ["kernels.tar.zst", "kernels.tar"])
def test_there_and_back(store: KernelStore, target: KernelStore, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    packed = pack(store, out)
    data = out.read_bytes()
    assert (packed.entries, packed.bytes) == (5, len(data))
    assert packed.sha256 == hashlib.sha256(data).hexdigest()
    assert unpack(out, target, sha256=packed.sha256.upper()) == Unpacked(new=5, same=0)
    assert files_of(target.folder) == files_of(store.folder)
    assert unpack(out, target) == Unpacked(new=0, same=5)
    assert not list(tmp_path.glob("tmp-*"))


def test_any_tar_can_list_it(store: KernelStore, tmp_path: Path) -> None:
    pack(store, tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = tar.getmembers()
    assert {m.name for m in members} == files_of(store.folder).keys()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


@pytest.mark.parametrize("ending", [".tar.zst", ".tar"])
def test_the_same_kernels_give_the_same_bytes(store: KernelStore, tmp_path: Path, ending: str) -> None:
    other = KernelStore(tmp_path / "elsewhere")
    for entry in reversed(list(store.entries())):
        found = store.read(entry.triton, entry.target, entry.key)
        assert found is not None
        other.write(*found)
    for path in other.root.rglob("*.*"):
        os.utime(path, (time.time() - 1e6,) * 2)
        path.chmod(0o600)
    first, second = pack(store, tmp_path / f"a{ending}"), pack(other, tmp_path / f"b{ending}")
    assert first == second


def test_a_shared_binary_is_packed_once(target: KernelStore, tmp_path: Path) -> None:
    store = filled(tmp_path / "cache", 0)
    entry, binary = kernel()
    store.write(replace(entry, key="f" * 32), binary)
    assert pack(store, tmp_path / "a.tar").entries == 2
    assert unpack(tmp_path / "a.tar", target).new == 2
    assert files_of(target.folder) == files_of(store.folder)


def test_only_some_targets_or_a_version(store: KernelStore, target: KernelStore, tmp_path: Path) -> None:
    assert pack(store, tmp_path / "a.tar", targets=["sm_90"]).entries == 4
    assert pack(store, tmp_path / "a.tar", targets=["sm_90", "gfx942"], triton=TRITON).entries == 4
    assert pack(store, tmp_path / "a.tar", triton="3.9.0").entries == 1
    unpack(tmp_path / "a.tar", target)
    assert list(target.folders()) == [("3.9.0", "sm_90")]
    with pytest.raises(KernelCacheError, match=r"no such kernels.*it has: gfx942 \(Triton 3.6.0\), sm_90"):
        pack(store, tmp_path / "b.tar", targets=["sm_100"])
    with pytest.raises(KernelCacheError, match=r"end it in .tar.zst or .tar"):
        pack(store, tmp_path / "b.zip")
    assert not list(tmp_path.glob("b.*"))


def test_corrupt_kernels_are_named_and_not_packed(store: KernelStore, tmp_path: Path) -> None:
    out = tmp_path / "a.tar"
    out.write_text("an older one")
    spoilt = [next(store.root.rglob("*.json")), next(store.root.rglob("*.hsaco"))]
    for path in spoilt:
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(KernelCacheError, match="corrupt kernels") as error:
        pack(store, out)
    assert all(path.name in str(error.value) for path in spoilt)
    assert out.read_text() == "an older one"
    with pytest.raises(KernelCacheError, match="corrupt kernels"):
        diff(store.folder, store.folder)


def test_what_is_corrupt_is_mended_by_unpacking(store: KernelStore, tmp_path: Path) -> None:
    pack(store, tmp_path / "a.tar.zst")
    before = files_of(store.folder)
    next(store.root.rglob("*.cubin")).write_text("torn")
    next(store.root.rglob("*.hsaco")).unlink()
    assert unpack(tmp_path / "a.tar.zst", store).new == 2
    assert files_of(store.folder) == before


def test_a_full_disk_in_the_middle_leaves_nothing_broken(
    store: KernelStore, target: KernelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(store, tmp_path / "a.tar")
    real, written = archive.write_atomically, []

    def fill_up(path: Path, data: bytes) -> None:
        if len(written) == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path.suffix)
        real(path, data)

    monkeypatch.setattr(archive, "write_atomically", fill_up)
    with pytest.raises(OSError, match="No space left"):
        unpack(tmp_path / "a.tar", target)
    assert sorted(written[:5]) == [".cubin"] * 4 + [".hsaco"]
    assert written[5:] == [".json"] * 2
    assert [problem for problem in target.verify() if not problem.leftover] == []
    written.clear()
    assert unpack(tmp_path / "a.tar", target) == Unpacked(new=3, same=2)
    assert len(written) == 6  # what is there is not written again
    assert files_of(target.folder) == files_of(store.folder)


def test_an_archive_that_changes_while_it_is_read(
    target: KernelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = by_hand(tmp_path / "a.tar", members_of(0))
    real = archive._is_stored

    def exchange_it(*arguments: Any) -> bool:
        path.write_bytes(path.read_bytes().replace(b"code of", b"evil of"))
        return real(*arguments)

    monkeypatch.setattr(archive, "_is_stored", exchange_it)
    refused(path, target, "was changed while it was read")


def test_a_wrong_sha256_stops_it(store: KernelStore, target: KernelStore, tmp_path: Path) -> None:
    pack(store, tmp_path / "a.tar")
    for wanted, said in (("0" * 64, "has the SHA-256"), ("deadbeef", "64 hex digits")):
        with pytest.raises(KernelCacheError, match=said):
            unpack(tmp_path / "a.tar", target, sha256=wanted)
    assert not target.folder.exists()


def members_of(*numbers: int) -> list[tuple[str, bytes]]:
    found = []
    for number in numbers:
        entry, binary = kernel(number)
        folder = f"v1/{entry.triton}/{entry.target}"
        found += [(f"{folder}/{entry.manifest_name}", write_manifest(entry))]
        found += [(f"{folder}/{entry.binary_name}", binary)]
    return found


def by_hand(path: Path, members: list[tuple[str, bytes]], edit: Edit | None = None) -> Path:
    """A tar whose first member's header is edited."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if edit is not None and not tar.members:
                edit(info)
            tar.addfile(info, io.BytesIO(data))
    return path


def refused(path: Path, target: KernelStore, said: str) -> None:
    with pytest.raises(KernelCacheError, match=said):
        unpack(path, target)
    assert not target.folder.exists()


def test_a_tar_made_by_hand_will_do(target: KernelStore, tmp_path: Path) -> None:
    assert unpack(by_hand(tmp_path / "a.tar", members_of(1, 0)), target).new == 2
    assert target.verify() == []


KEY = "0" * 32


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (f"/v1/3.6.0/sm_90/{KEY}.json", "absolute path"),
        (f"\\v1\\{KEY}.json", "absolute path"),
        (f"v1/../../sm_90/{KEY}.json", "leaves the folder"),
        (f"../v1/3.6.0/sm_90/{KEY}.json", "leaves the folder"),
        (f"v1/3.6.0/sm_90\\..\\{KEY}.json", "leaves the folder"),
        (f"./v1/3.6.0/sm_90/{KEY}.json", "is no name"),
        (f"v1/3.6.0/sm_90/x/{KEY}.json", "is no name"),
        (f"v1/3.6.0/{KEY}.json", "is no name"),
        (f"v1/3.6.0/sm_90/{KEY}.so", "is no name"),
        (f"v1/3.6.0/sm_90/{KEY}.json\n", "is no name"),
        ("v1/3.6.0/sm_90/tmp-0123456789abcdef", "is no name"),
        ("README", "is no name"),
        (f"v2/3.6.0/sm_90/{KEY}.json", "is of format 2; this Halimede reads 1"),
    ],
)
def test_names_that_pack_never_gives_are_refused(
    target: KernelStore, tmp_path: Path, name: str, said: str
) -> None:
    refused(by_hand(tmp_path / "a.tar", [*members_of(0), (name, b"x"), *members_of(1)]), target, said)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a pipe"),
        (tarfile.DIRTYPE, "a folder"),
        (tarfile.CONTTYPE, "an entry of type"),
    ],
)
def test_only_files_are_taken(target: KernelStore, tmp_path: Path, kind: bytes, said: str) -> None:
    def edit(info: tarfile.TarInfo) -> None:
        info.type, info.linkname, info.size = kind, "/etc/passwd", 0

    refused(by_hand(tmp_path / "a.tar", members_of(0), edit), target, said)


def test_sizes_and_numbers_have_limits(
    target: KernelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tarfile.TarInfo(members_of(0)[0][0])
    info.size = (256 << 20) + 1
    (tmp_path / "large.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    refused(tmp_path / "large.tar", target, "has 268435457 bytes")
    info.size = -1
    (tmp_path / "negative.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    refused(tmp_path / "negative.tar", target, "has -1 bytes")
    monkeypatch.setattr(archive_tar, "MAX_MEMBERS", 3)
    refused(by_hand(tmp_path / "many.tar", members_of(0, 1)), target, "more than 3 members")


def test_a_bomb_stops_at_the_limit(target: KernelStore, tmp_path: Path) -> None:
    info = tarfile.TarInfo(members_of(0)[0][0])
    info.size = 1 << 40
    for begin, said in (
        (info.tobuf(tarfile.GNU_FORMAT), "has 1099511627776 bytes"),
        (by_hand(tmp_path / "whole.tar", members_of(0)).read_bytes(), "after its end"),
    ):
        (tmp_path / "a.tar.zst").write_bytes(zstandard.compress(begin + bytes(64 << 20)))
        refused(tmp_path / "a.tar.zst", target, said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: [*m, m[0]], "twice"),
        (lambda m: m[1:], "belongs to no kernel"),
        (lambda m: m[:1], "which .* needs, is missing"),
        (lambda m: [m[0], (m[1][0], m[1][1][:-1] + b"x")], "does not fit its digest"),
        (lambda m: [m[0], (m[1][0], m[1][1] + b"x")], "does not fit its digest"),
        (lambda m: [(m[0][0], m[0][1].replace(b"32,", b"33,")), m[1]], "was altered"),
        (lambda m: [(m[0][0].replace("sm_90", "sm_80"), m[0][1]), m[1]], "is of 3.6.0/sm_90"),
        (lambda m: [(m[0][0], b"{}"), m[1]], "is not the manifest"),
        (lambda m: [m[0], (m[1][0].replace("cubin", "hsaco"), m[1][1])], "needs, is missing"),
    ],
)
def test_whole_kernels_only(
    target: KernelStore,
    tmp_path: Path,
    change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]],
    said: str,
) -> None:
    members = members_of(1, 0)
    refused(by_hand(tmp_path / "a.tar", [*members[:2], *change(members[2:])]), target, said)


@pytest.mark.parametrize("ending", [".tar.zst", ".tar"])
def test_truncated_and_longer_archives_are_refused(
    store: KernelStore, target: KernelStore, tmp_path: Path, ending: str
) -> None:
    whole, cut = tmp_path / f"whole{ending}", tmp_path / f"cut{ending}"
    pack(store, whole)
    data = whole.read_bytes()
    for length in (*range(0, len(data), max(1, len(data) // 60)), len(data) - 512, len(data) - 1):
        cut.write_bytes(data[:length])
        refused(cut, target, "truncated|is not")
    for tail in (b"x", data):
        cut.write_bytes(data + tail)
        refused(cut, target, "after its end")


def test_flipped_bits_are_refused(store: KernelStore, target: KernelStore, tmp_path: Path) -> None:
    whole, bad = tmp_path / "a.tar.zst", tmp_path / "b.tar.zst"
    pack(store, whole)
    good = whole.read_bytes()
    for place in range(0, len(good), max(1, len(good) // 150)):
        bad.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        refused(bad, target, "damaged|truncated|after its end|not compressed")


def test_files_of_other_kinds_are_refused(target: KernelStore, tmp_path: Path) -> None:
    for name, data, said in (
        ("a.tar.zst", b"\x1f\x8b" + bytes(600), "not compressed with zstd"),
        ("a.tar", b"PK\x03\x04" + bytes(600), "is not a tar"),
        ("b.tar.zst", zstandard.compress(b"hello" * 200), "is not a tar"),
        ("b.tar", b"", "truncated"),
    ):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, target, said)
    refused(tmp_path / "absent.tar", target, "does not exist")


def test_an_empty_archive_has_nothing(target: KernelStore, tmp_path: Path) -> None:
    assert unpack(by_hand(tmp_path / "a.tar", []), target) == Unpacked(new=0, same=0)


def test_without_zstandard_the_remedy_is_told(
    store: KernelStore, target: KernelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(store, tmp_path / "a.tar.zst")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(KernelCacheError, match=r"pip install zstandard, or use a plain \.tar"):
        pack(store, tmp_path / "b.tar.zst")
    refused(tmp_path / "a.tar.zst", target, "pip install zstandard")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.zst", "cache"]
    assert pack(store, tmp_path / "b.tar").entries == 5


def test_a_failed_pack_leaves_no_file(
    store: KernelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = KernelStore.read_files
    calls: list[str] = []

    def vanishing(self: KernelStore, triton: str, target: str, key: str) -> object:
        calls.append(key)
        return None if len(calls) > 7 else real(self, triton, target, key)

    monkeypatch.setattr(KernelStore, "read_files", vanishing)
    with pytest.raises(KernelCacheError, match="was removed"):
        pack(store, tmp_path / "a.tar")
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_differences(store: KernelStore, tmp_path: Path) -> None:
    other = filled(tmp_path / "other", 0, 1, 5)
    rebuilt, binary = kernel(1, binary=b"other code")
    other.write(rebuilt, binary)
    pack(store, tmp_path / "a.tar.zst")
    for a in (store.folder, tmp_path / "a.tar.zst"):
        found = diff(a, other.folder)
        assert [(e.triton, e.target, e.entry_point) for e in found.only_a] == [
            ("3.6.0", "gfx942", "_norm_0_kernel"),
            ("3.6.0", "sm_90", "_norm_2_kernel"),
            ("3.9.0", "sm_90", "_norm_0_kernel"),
        ]
        assert [e.entry_point for e in found.only_b] == ["_norm_5_kernel"]
        assert found.changed == ((kernel(1)[0], rebuilt),)
        assert found
    assert not diff(store.folder, tmp_path / "a.tar.zst")
    with pytest.raises(KernelCacheError, match="does not exist"):
        diff(store.folder, tmp_path / "nothing")
