"""The gguf package's reader, made safe for damaged files and quick for large vocabularies.

The only module of ours that imports `gguf` when it is imported; import it inside a function.
"""

import struct

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader
from gguf.constants import GGUFValueType
from gguf.gguf_reader import ReaderField

_LENGTH = struct.Struct("<Q")


class CheckedReader(GGUFReader):
    """GGUFReader that never reads past the end of the file and keeps an array as one piece.

    The original cuts a read short at the end of the file, so that damage shows later or not at all, and makes
    two small numpy arrays per token (3 s for 49k tokens and as many merges, against 0.1 s here). In the field
    of an array, `parts[-1]` is the whole array; for an array of strings its bytes, see `strings`.

    Raises EOFError for a read past the end; ValueError, KeyError and others for contents that make no sense.
    """

    def _get(
        self, offset: int, dtype: npt.DTypeLike, count: int = 1, override_order: str | None = None
    ) -> npt.NDArray[np.generic]:
        end = offset + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise EOFError(f"bytes {offset} to {end} are needed, the file has {len(self.data)}")
        return super()._get(offset, dtype, count, override_order)  # type: ignore[arg-type]

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[npt.NDArray[np.generic]], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        raw_item_type = self._get(orig_offs, np.uint32)
        length = self._get(orig_offs + 4, np.uint64)
        start, count = orig_offs + 12, int(length[0])
        item_type = GGUFValueType(int(raw_item_type[0]))
        if item_type == GGUFValueType.STRING:
            data = self._get(start, np.uint8, self._end_of_strings(start, count) - start)
        elif item_type in self.gguf_scalar_to_np:
            data = self._get(start, self.gguf_scalar_to_np[item_type], count)
        else:
            raise ValueError(f"an array of {item_type.name} is not supported")
        return 12 + data.nbytes, [raw_item_type, length, data], [2], [GGUFValueType.ARRAY, item_type]

    def _end_of_strings(self, start: int, count: int) -> int:
        data, size = self.data.data, len(self.data)
        end, unpack = start, _LENGTH.unpack_from
        for _ in range(count):
            if end + 8 > size:
                raise EOFError(
                    f"an array of {count} strings at byte {start} ends after the file's {size} bytes"
                )
            end += 8 + unpack(data, end)[0]
        return end


def strings(field: ReaderField) -> list[str]:
    """The strings of a CheckedReader field that is an array of strings."""
    data = field.parts[-1].tobytes()
    size, unpack = len(data), _LENGTH.unpack_from
    pieces: list[bytes] = []
    offset = 0
    while offset < size:
        start = offset + 8
        offset = start + unpack(data, offset)[0]
        pieces.append(data[start:offset])
    return [piece.decode() for piece in pieces]
