"""A tar of plain files, compressed with zstd or not, written and read strictly.

Reading takes files only, and everything up to the archive's last byte: Python's `tarfile` ends quietly where
an archive is cut off or damaged. Its bytes hang on the files' names and contents only.
"""

import tarfile
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from halimede.errors import KernelCacheError

if TYPE_CHECKING:
    from types import ModuleType

MAX_MEMBERS = 100_000
MAX_MEMBER_BYTES = 256 << 20

_BLOCK = 512
_MAGIC = b"\x28\xb5\x2f\xfd"  # of a zstd frame
_LEVEL = 10
_WINDOW_BYTES = 128 << 20
# 4 bytes of a frame can hold 128 KiB: 1 KiB at a time, a hostile archive gets 32 MiB of memory.
_COMPRESSED_CHUNK = 1 << 10
_PLAIN_CHUNK = 1 << 20
_MAX_PADDING = 1 << 20
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.DIRTYPE: "a folder",
    tarfile.FIFOTYPE: "a pipe",
}


class _Sink(Protocol):
    def write(self, data: bytes, /) -> Any:
        """Take all of data."""


def write_archive(sink: _Sink, members: Iterable[tuple[str, bytes]], *, compress: bool) -> None:
    """Write (name, content) pairs in their order: no times, no owners, mode 0644.

    Raises KernelCacheError: `compress` without the package zstandard; OSError: the disk is full.
    """
    if not compress:
        _write_tar(sink, members)
        return
    # The checksum is for what lies between the members: their own digests cover the rest.
    compressor = _zstandard().ZstdCompressor(level=_LEVEL, write_checksum=True)
    with compressor.stream_writer(sink, closefd=False) as compressed:
        _write_tar(compressed, members)


def _write_tar(sink: _Sink, members: Iterable[tuple[str, bytes]]) -> None:
    for name, data in members:
        header = tarfile.TarInfo(name)
        header.size = len(data)
        sink.write(header.tobuf(tarfile.USTAR_FORMAT))
        sink.write(data)
        sink.write(bytes(-len(data) % _BLOCK))
    sink.write(bytes(2 * _BLOCK))


def read_archive(file: BinaryIO, path: str) -> Iterator[tuple[str, bytes]]:
    """Every member's name and content, from the start of `file`; `path` is named in errors.

    Raises KernelCacheError: it is no such archive, is truncated or damaged, has data after its end, members
    that are no files, too many of them or a too large one; the package zstandard is missing. Names are as the
    archive has them: whoever uses them as paths checks them first.
    """
    stream = _Stream(_contents(file, path), path)
    number = 0
    while (header := stream.take(_BLOCK)) != bytes(_BLOCK):
        number += 1
        if number > MAX_MEMBERS:
            raise KernelCacheError(f"{path} has more than {MAX_MEMBERS} members; it is not of Halimede")
        name, size = _parse_header(header, path, number)
        data = stream.take(size)
        stream.take(-size % _BLOCK)
        yield name, data
    stream.take(_BLOCK)  # a tar ends with two empty blocks, and more up to what size its writer likes
    stream.finish()


def _parse_header(header: bytes, path: str, number: int) -> tuple[str, int]:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "backslashreplace")
    except (tarfile.TarError, ValueError) as error:
        what = "is not a tar" if number == 1 else f"is damaged at its member {number}"
        raise KernelCacheError(
            f"{path} {what} ({error}); give an archive that `halimede kernels pack` made"
        ) from error
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        kind = _KINDS.get(info.type, f"an entry of type {info.type!r}")
        raise KernelCacheError(f"{path}: {info.name!r} is {kind}, not a file; `unpack` takes only files")
    if not 0 <= info.size <= MAX_MEMBER_BYTES:
        raise KernelCacheError(
            f"{path}: {info.name!r} has {info.size} bytes; a kernel has {MAX_MEMBER_BYTES} at most"
        )
    return info.name, info.size


class _Stream:
    """Bytes of an archive, as many as are asked for."""

    def __init__(self, chunks: Iterator[bytes], path: str) -> None:
        self._chunks = chunks
        self._path = path
        self._held = bytearray()

    def take(self, size: int) -> bytes:
        while len(self._held) < size:
            chunk = next(self._chunks, None)
            if chunk is None:
                raise _truncated(self._path)
            self._held += chunk
        taken = bytes(self._held[:size])
        del self._held[:size]
        return taken

    def finish(self) -> None:
        """Read on to the end, where nothing but a few zeros may be."""
        size = 0
        for chunk in chain([bytes(self._held)], self._chunks):
            size += len(chunk)
            if size > _MAX_PADDING or any(chunk):
                raise _more_data(self._path)


def _contents(file: BinaryIO, path: str) -> Iterator[bytes]:
    """The file's bytes from its start, decompressed if they are compressed."""
    file.seek(0)
    compressed = file.read(len(_MAGIC)) == _MAGIC
    file.seek(0)
    if not compressed:
        if path.endswith(".zst"):
            raise KernelCacheError(f"{path} is not compressed with zstd; give an archive that `pack` made")
        while chunk := file.read(_PLAIN_CHUNK):
            yield chunk
        return
    zstandard = _zstandard()
    frame = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES).decompressobj()
    while chunk := file.read(_COMPRESSED_CHUNK):
        if frame.eof:
            raise _more_data(path)
        try:
            yield frame.decompress(chunk)
        except zstandard.ZstdError as error:
            raise KernelCacheError(f"{path} is damaged ({error}); copy or pack it again") from error
        if frame.unused_data:
            raise _more_data(path)
    if not frame.eof:
        raise _truncated(path)


def _truncated(path: str) -> KernelCacheError:
    return KernelCacheError(f"{path} is truncated; copy or pack it again")


def _more_data(path: str) -> KernelCacheError:
    return KernelCacheError(f"{path} has data after its end; copy or pack it again")


def _zstandard() -> "ModuleType":
    try:
        import zstandard
    except ImportError as error:
        raise KernelCacheError(
            f"a .tar.zst needs the package zstandard, which cannot be imported ({error}); "
            "pip install zstandard, or use a plain .tar"
        ) from error
    return zstandard
