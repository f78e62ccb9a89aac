"""What the loader needs to know of a checkpoint on disk. A leaf: everything in `loader` may import it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

CheckpointFormat = Literal["safetensors", "torch_bin", "gguf", "dummy"]


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one checkpoint, found and complete, with its configuration read.

    `weights` lists every shard in order; it is empty for the format "dummy", which is random weights.
    `config` has the form of a Hugging Face config.json (for a GGUF it is made from the metadata) and
    `config_source` names the file it came from. `generation_config` is empty when the checkpoint has none.
    `tokenizer_path` is a directory with tokenizer files, the .gguf file itself for a GGUF, or None where
    there is no tokenizer.
    """

    reference: str
    format: CheckpointFormat
    weights: tuple[Path, ...]
    config: dict[str, Any]
    config_source: str
    generation_config: dict[str, Any] = field(default_factory=dict)
    tokenizer_path: Path | None = None
