"""The weights of a GGUF under their Hugging Face names, one tensor at a time."""

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from halimede.engine.loader.gguf_file import GgufFile, need_for_all_layers, open_gguf_shards
from halimede.engine.loader.gguf_names import hf_names
from halimede.errors import ModelLoadError, UnsupportedQuantizationError

if TYPE_CHECKING:
    from gguf.gguf_reader import ReaderTensor

logger = logging.getLogger(__name__)

# Elements dequantized at once: gguf's own 16 rows at a time are four times slower on narrow matrices, and
# larger pieces gain nothing and hold more temporary memory.
_CHUNK = 1 << 17

# In some files of Gemma 3: the part that sees, and what joins it to the text.
_VISION = ("v.", "mm.")
# Not weights: the configuration carries them.
_IN_CONFIG = ("rope_freqs.weight",)


class GgufWeights:
    """A WeightSource over the shards of one GGUF model.

    F16, BF16 and F32 come as they are, as views of the mapped file unless their rows must be reordered. A
    quantized tensor comes out as float32, or, if it is one of `quantized`, as its bytes: uint8 [rows, bytes].
    Tensors that have no Hugging Face name keep their GGUF name.

    Raises ModelLoadError for unreadable files, UnsupportedModelError for an unknown architecture, and from
    `get` UnsupportedQuantizationError for a type that the gguf package cannot dequantize.
    """

    def __init__(self, paths: Sequence[Path], quantized: Collection[str] = ()) -> None:
        files = open_gguf_shards(paths)
        meta = files[0]
        arch = meta.need("general.architecture", str)
        num_layers = meta.need(f"{arch}.block_count", int)
        if num_layers > sum(len(file.tensors) for file in files):
            raise ModelLoadError(f"{meta.path}: {num_layers} layers have no tensors; download it again")
        names = hf_names(arch, num_layers, meta.path)
        self._tensors: dict[str, tuple[GgufFile, ReaderTensor]] = {}
        for file in files:
            for name, tensor in file.tensors.items():
                if name not in _IN_CONFIG and not (arch == "gemma3" and name.startswith(_VISION)):
                    self._tensors[names.get(name, name)] = (file, tensor)
        self._permuted_heads = _permuted_heads(meta) if arch == "llama" else {}
        self._quantized = quantized
        self._log_dequantized()
        # Norm weights have the one added that Hugging Face's Gemma adds when it runs.
        self._norms_plus_one = arch == "gemma3"

    def names(self) -> Collection[str]:
        """Hugging Face names of all weights."""
        return self._tensors.keys()

    def where(self, name: str) -> str:
        """The name of the file that holds weight `name`."""
        return self._find(name)[0].path.name

    def get(self, name: str) -> torch.Tensor:
        """Weight `name` on the CPU, as Hugging Face lays it out."""
        weight = self._read(name)
        return weight.float() - 1 if self._norms_plus_one and name.endswith("norm.weight") else weight

    def close(self) -> None:
        """Let go of the files; tensors handed out as views keep theirs mapped."""
        self._tensors = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, name: str) -> torch.Tensor:
        file, tensor = self._find(name)
        data: np.ndarray[Any, Any] = tensor.data
        heads = self._permuted_heads.get(name.rsplit(".", 2)[-2]) if name.count(".") >= 2 else None
        if heads is not None:
            # Whole rows move, so this is done on the quantized bytes.
            data = _undo_permutation(data, heads, f"{file.path}: {tensor.name}")
        kind = tensor.tensor_type.name
        if name in self._quantized:
            return torch.from_numpy(data)
        if kind == "BF16":
            return torch.from_numpy(data).view(torch.bfloat16)
        if data.dtype != np.uint8:
            return torch.from_numpy(data)
        try:
            return torch.from_numpy(_dequantize(data, tensor))
        except NotImplementedError as error:
            raise UnsupportedQuantizationError(
                f"{file.path}: tensor {tensor.name} is {kind}, which cannot be dequantized; "
                "use a GGUF of another type, such as Q8_0 or Q4_K_M"
            ) from error

    def _log_dequantized(self) -> None:
        plain = ("F32", "F16", "BF16")
        kinds = Counter(
            tensor.tensor_type.name
            for name, (_, tensor) in self._tensors.items()
            if name not in self._quantized and tensor.tensor_type.name not in plain
        )
        if kinds:
            listed = ", ".join(f"{count} of type {kind}" for kind, count in sorted(kinds.items()))
            logger.info("tensors that are dequantized while they are loaded: %s", listed)

    def _find(self, name: str) -> "tuple[GgufFile, ReaderTensor]":
        if name not in self._tensors:
            raise ModelLoadError(f"no tensor {name} in the GGUF; it has {len(self._tensors)} others")
        return self._tensors[name]


def _permuted_heads(meta: GgufFile) -> dict[str, int]:
    """Heads of the projections whose rows are reordered in a file of architecture "llama".

    GGUF pairs neighbouring rows of a head for the rotary embedding, Hugging Face row i with row i + D/2.
    """
    heads = kv_heads = need_for_all_layers(meta, "llama.attention.head_count")
    if "llama.attention.head_count_kv" in meta:
        kv_heads = need_for_all_layers(meta, "llama.attention.head_count_kv")
    return {"q_proj": heads, "k_proj": kv_heads}


def _undo_permutation(data: np.ndarray[Any, Any], heads: int, where: str) -> np.ndarray[Any, Any]:
    """Rows (heads * D, ...) from GGUF's order in a head, 0, D/2, 1, D/2 + 1, ..., to 0, 1, 2, ..."""
    rows = data.shape[0]
    if heads < 1 or rows % (2 * heads) != 0:
        raise ModelLoadError(f"{where} has {rows} rows, which {heads} heads do not divide; convert it again")
    paired = data.reshape(heads, rows // heads // 2, 2, *data.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(data.shape)


def _dequantize(data: np.ndarray[Any, Any], tensor: "ReaderTensor") -> np.ndarray[Any, Any]:
    """Quantized rows (rows, bytes) to float32 (rows, columns), a chunk at a time."""
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    block, block_bytes = GGML_QUANT_SIZES[tensor.tensor_type]
    blocks = data.reshape(-1, block_bytes)
    result = np.empty((len(blocks), block), np.float32)
    step = max(1, _CHUNK // block)
    for start in range(0, len(blocks), step):
        chunk = blocks[start : start + step].reshape(1, -1)
        result[start : start + step] = dequantize(chunk, tensor.tensor_type).reshape(-1, block)
    return result.reshape(*data.shape[:-1], data.shape[-1] // block_bytes * block)
