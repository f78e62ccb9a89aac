"""The sizes of a model: what its weights and its KV cache weigh, and a folder with its config.json.

The presets are the files of `geometries/`; context lengths go up to 16,384 there, whatever the original was
trained for, since no weight knows.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRESETS = Path(__file__).parent / "geometries"
_SMALLER = {"llama-3-8b": "llama-3.2-1b"}
_BF16 = 2
# Beside the weights: activations, the logits of a step, a KV cache that is worth measuring.
_ROOM = 2 << 30
_USABLE = 0.92


@dataclass(frozen=True)
class Geometry:
    """config: as config.json has it. Bytes are those of bfloat16."""

    name: str
    config: dict[str, Any]

    @property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of the matrices of a layer, merged as the engine multiplies them."""
        c = self.config
        hidden, middle = c["hidden_size"], c["intermediate_size"]
        heads = c["num_attention_heads"] * c["head_dim"]
        kv_heads = c["num_key_value_heads"] * c["head_dim"]
        return {
            "qkv": (heads + 2 * kv_heads, hidden),
            "o": (hidden, heads),
            "gate_up": (2 * middle, hidden),
            "down": (hidden, middle),
        }

    @property
    def streamed_bytes(self) -> int:
        """Weights that a decoding step reads: all but the rows of the embedding that it does not look up."""
        hidden = self.config["hidden_size"]
        matrices = sum(rows * columns for rows, columns in self.projections.values())
        norms = hidden * (2 * self.num_layers + 1)
        return _BF16 * int(self.num_layers * matrices + self.vocab_size * hidden + norms)

    @property
    def weight_bytes(self) -> int:
        embedding = _BF16 * self.vocab_size * self.config["hidden_size"]
        return self.streamed_bytes + (0 if self.config["tie_word_embeddings"] else embedding)

    @property
    def kv_bytes_per_token(self) -> int:
        c = self.config
        return 2 * self.num_layers * int(c["num_key_value_heads"]) * int(c["head_dim"]) * _BF16

    def fits(self, memory_bytes: int) -> bool:
        """Whether a GPU with that much memory can hold it and still be measured."""
        return self.weight_bytes + _ROOM <= _USABLE * memory_bytes

    def write(self, folder: Path) -> Path:
        """A directory with nothing but config.json, which load_format="dummy" takes."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder


def load_geometry(name: str) -> Geometry:
    """A preset, or a file of that form."""
    path = Path(name) if name.endswith(".json") else PRESETS / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.json")))
        raise SystemExit(f"geometry {name!r} is not known; use a file.json or one of: {known}")
    return Geometry(path.stem, json.loads(path.read_text()))


def choose_geometry(name: str, memory_bytes: int | None) -> tuple[Geometry, str | None]:
    """The named one, or a smaller one where it does not fit, with a line that says so.

    memory_bytes: of the GPU; None without one. SystemExit if nothing fits.
    """
    geometry = load_geometry(name)
    if memory_bytes is None or geometry.fits(memory_bytes):
        return geometry, None
    room = f"{name} needs {geometry.weight_bytes / 1e9:.1f} GB for weights alone"
    smaller = _SMALLER.get(name)
    if smaller is None:
        raise SystemExit(f"{room}, more than this GPU has ({memory_bytes / 1e9:.1f} GB)")
    found, _ = choose_geometry(smaller, memory_bytes)
    return found, f"{room}, and this GPU has {memory_bytes / 1e9:.1f} GB: measured is {found.name}"
