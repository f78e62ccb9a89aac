"""Models in GGUF files: which files, their configuration, their weights."""

from halimede.engine.loader.gguf_config import read_gguf_config
from halimede.engine.loader.gguf_file import find_gguf_shards
from halimede.engine.loader.gguf_weights import GgufWeights

__all__ = ["GgufWeights", "find_gguf_shards", "read_gguf_config"]
