"""Writes the README's table of quantized checkpoints from the registry of methods.

python scripts/quantization_table.py            # writes it
python scripts/quantization_table.py --check    # 1 if the README has another
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from readme_table import write_or_check

from halimede.engine.quant.online_names import ONLINE_METHODS
from halimede.engine.quant.registry import METHODS

CPU: Mapping[str, str] = {
    "WNA16": "packed 4-bit products, or in pieces",
    "W8A8": "int8 products",
    "FP8": "widened in pieces",
}
GPU: Mapping[str, str] = {
    "WNA16": "4- and 8-bit product",
    "W8A8": "int8 product",
    "FP8": "FP8 product, widened where there is none",
}
ONLINE: Mapping[str, tuple[str, str]] = {
    "int4": ("4 bits in groups of 128 or fewer columns, with zero points or without", "WNA16"),
    "int8": ("a scale for each row; activations of 8 bits, a scale for each token", "W8A8"),
    "fp8": ("e4m3, a scale for each row", "FP8"),
}


def table() -> str:
    """A row for each format of a checkpoint, then one for each that plain ones are quantized to."""
    lines = ["| checkpoint format | read | runs as | CPU | GPU |", "| --- | --- | --- | --- | --- |"]
    rows = [(method.title, method.weights, method.form) for method in METHODS.values()]
    rows += [(f"plain, `quantization={name!r}`".replace("'", '"'), *ONLINE[name]) for name in ONLINE_METHODS]
    for title, weights, form in rows:
        cpu, gpu = ("; ".join(each[kind.strip()] for kind in form.split(",")) for each in (CPU, GPU))
        lines.append(f"| {title} | {weights} | {form} | {cpu} | Triton: {gpu} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(write_or_check("quantization", Path(__file__).name, table()))
