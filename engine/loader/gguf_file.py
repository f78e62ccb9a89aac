"""One open GGUF file: its metadata with types checked, its tensors, and errors a user can act on."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from halimede.errors import ModelLoadError, UnsupportedModelError, UnsupportedQuantizationError

if TYPE_CHECKING:
    from gguf.gguf_reader import GGUFReader, ReaderTensor

_Value = TypeVar("_Value", int, float, str, bool)

_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_DOWNLOAD_AGAIN = "download it again"


class GgufFile:
    """A GGUF file, mapped into memory. `tensors` maps GGUF names to the gguf package's ReaderTensor."""

    def __init__(self, path: Path, reader: "GGUFReader") -> None:
        self.path = path
        self.tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}
        self._reader = reader

    def __contains__(self, key: str) -> bool:
        return key in self._reader.fields

    def list_keys(self) -> Collection[str]:
        """Names of all metadata."""
        return self._reader.fields.keys()

    def find(self, key: str, kind: type[_Value]) -> _Value | None:
        """The scalar at `key`, None where there is none. Raises ModelLoadError when it is not a `kind`."""
        field = self._reader.fields.get(key)
        if field is None:
            return None
        value: Any = self._array(key) if self._is_array(key) else self._scalar(key)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not kind:
            raise ModelLoadError(
                f"{self.path}: {key} is {_shorten(value)}, but should be of type {kind.__name__}; "
                "convert the model to GGUF again"
            )
        return value

    def need(self, key: str, kind: type[_Value]) -> _Value:
        """The scalar at `key`. Raises ModelLoadError when it is missing or not a `kind`."""
        value = self.find(key, kind)
        if value is None:
            raise ModelLoadError(f"{self.path} has no {key}; convert the model to GGUF again")
        return value

    def find_array(self, key: str, kind: type[_Value]) -> list[_Value] | None:
        """The array at `key`, None where there is none. Raises ModelLoadError for items of another kind."""
        if key not in self._reader.fields:
            return None
        value = self._array(key) if self._is_array(key) else self._scalar(key)
        if isinstance(value, list) and kind is float:
            value = [float(item) if type(item) is int else item for item in value]
        if not isinstance(value, list) or not set(map(type, value)) <= {kind}:
            raise ModelLoadError(
                f"{self.path}: {key} is {_shorten(value)}, but should be an array of {kind.__name__}; "
                "convert the model to GGUF again"
            )
        return value

    def is_array(self, key: str) -> bool:
        """Whether `key` is there and holds an array."""
        return key in self._reader.fields and self._is_array(key)

    def _is_array(self, key: str) -> bool:
        from gguf.constants import GGUFValueType

        return self._reader.fields[key].types[:1] == [GGUFValueType.ARRAY]

    def _scalar(self, key: str) -> Any:
        try:
            return self._reader.fields[key].contents()
        except UnicodeDecodeError as error:
            raise self._not_text(key, error) from error

    def _array(self, key: str) -> list[Any]:
        from gguf.constants import GGUFValueType

        from halimede.engine.loader.gguf_reader import strings

        field = self._reader.fields[key]
        try:
            if field.types[-1] == GGUFValueType.STRING:
                return strings(field)
        except UnicodeDecodeError as error:
            raise self._not_text(key, error) from error
        return list(field.parts[-1].tolist())

    def _not_text(self, key: str, error: UnicodeDecodeError) -> ModelLoadError:
        return ModelLoadError(f"{self.path}: {key} is not valid UTF-8 ({error}); {_DOWNLOAD_AGAIN}")


def open_gguf(path: Path) -> GgufFile:
    """Map `path` into memory and read its metadata and tensor list; the tensors stay on disk.

    Raises ModelLoadError, naming the file, for one that is missing, empty, no GGUF, truncated or corrupt.
    """
    try:
        from halimede.engine.loader.gguf_reader import CheckedReader
    except ImportError as error:
        raise ModelLoadError(f"{path} needs the gguf package ({error}); run: pip install gguf") from error
    _check_header(path)
    try:
        # Copy-on-write: torch takes only writable arrays without a warning; nothing is ever written.
        return GgufFile(path, CheckedReader(path, "c"))
    except EOFError as error:
        raise ModelLoadError(f"{path} is truncated: {error}; {_DOWNLOAD_AGAIN}") from error
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError) as error:
        if "GGMLQuantizationType" in str(error):
            raise UnsupportedQuantizationError(
                f"{path}: a tensor has a type that the installed gguf package does not know ({error}); "
                "run: pip install -U gguf"
            ) from error
        raise ModelLoadError(
            f"{path} is not a readable GGUF, its metadata is corrupt: {error}; {_DOWNLOAD_AGAIN}"
        ) from error


def open_gguf_shards(paths: Sequence[Path]) -> list[GgufFile]:
    """Open all files of one model, in order.

    Raises ModelLoadError as `open_gguf` does, and when there are more or fewer shards or tensors than the
    first file announces.
    """
    files = [open_gguf(path) for path in paths]
    first = files[0]
    count = first.find("split.count", int) or 1
    if count > 1 and count != len(files):
        raise ModelLoadError(
            f"{first.path} is one of {count} shards, but {len(files)} were given; keep all shards "
            "in one directory under their original names"
        )
    announced = first.find("split.tensors.count", int)
    found = sum(len(file.tensors) for file in files)
    if announced is not None and announced != found:
        raise ModelLoadError(
            f"{first.path} and its shards hold {found} tensors, but {announced} are announced; "
            "download all shards of one version again"
        )
    return files


def find_gguf_shards(path: Path) -> tuple[Path, ...]:
    """All files of the model that `path` belongs to, in order: its -0000X-of-0000N siblings, or itself alone.

    Raises ModelLoadError when `path` or a sibling is missing.
    """
    match = _SHARD_NAME.fullmatch(path.name)
    if match is None:
        paths = [path]
    else:
        stem, count = match["stem"], int(match["count"])
        paths = [path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [p.name for p in paths if not p.is_file()]
    if missing or not paths:
        raise ModelLoadError(
            f"{path.parent} lacks {', '.join(missing[:5]) or path.name}, {len(missing)} of the model's "
            f"{len(paths)} files; put all of them there"
        )
    return tuple(paths)


def _check_header(path: Path) -> None:
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}; check the path") from error
    if not head:
        raise ModelLoadError(f"{path} is empty; {_DOWNLOAD_AGAIN}")
    if head.startswith(b"version https://git-lfs"):
        raise ModelLoadError(
            f"{path} is a Git-LFS pointer, not the file itself; run `git lfs pull` beside it"
        )
    if head[:4] != b"GGUF"[: len(head)]:
        raise ModelLoadError(
            f"{path} is not a GGUF: it starts with {head[:4]!r}, not b'GGUF'; check the path"
        )
    version = int.from_bytes(head[4:8], "little")
    if len(head) >= 8 and version & 0xFFFF and version not in (2, 3):
        raise ModelLoadError(f"{path} is GGUF version {version}, known are 2 and 3; convert the model again")
    if len(head) >= 8 and head[4:6] == b"\0\0":
        raise ModelLoadError(f"{path} is a big-endian GGUF, which is not supported; use a little-endian one")


def _shorten(value: Any) -> str:
    text = repr(value[:4] if isinstance(value, list) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def need_for_all_layers(meta: GgufFile, key: str) -> int:
    """A number that GGUF allows to be one per layer. Raises UnsupportedModelError where they differ."""
    if not meta.is_array(key):
        return meta.need(key, int)
    values = meta.find_array(key, int) or []
    if len(set(values)) != 1:
        raise UnsupportedModelError(
            f"{meta.path}: {key} differs between layers: {values[:8]}; use another model"
        )
    return values[0]
