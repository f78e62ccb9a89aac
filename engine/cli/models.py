"""`halimede models`: what can be run, read from the registries that decide it. Imports no torch."""

import ast
import importlib.util
import json
import sys
from dataclasses import asdict, dataclass
from typing import Annotated, get_args

import typer


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture as config.json names it, with what its module says of the families it covers.

    gguf: what a GGUF calls it; empty: not supported there.
    """

    name: str
    families: str
    gguf: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Supported:
    """Everything `halimede models` lists."""

    architectures: tuple[Architecture, ...]
    weight_formats: tuple[str, ...]
    gguf_types: tuple[str, ...]
    quantization: tuple[str, ...]
    online_quantization: tuple[str, ...]
    rope_types: tuple[str, ...]
    dtypes: tuple[str, ...]


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List what is supported.

    Architectures with their families, weight formats, types of GGUF tensors, quantization methods, rope
    types, data types.
    """
    supported = list_supported()
    if as_json:
        print(json.dumps(asdict(supported), indent=2, ensure_ascii=False))
    elif sys.stdout.isatty():
        _print_tables(supported)
    else:
        _print_lines(supported)


def list_supported() -> Supported:
    """Collect it from the registry, the loader and the annotations of the settings."""
    from halimede.engine.config import DType
    from halimede.engine.layers.rope_config import RopeType
    from halimede.engine.loader.model_files import CheckpointFormat
    from halimede.engine.models.registry import SUPPORTED_ARCHITECTURES
    from halimede.engine.quant.online_names import ONLINE_METHODS
    from halimede.engine.quant.registry import METHODS

    architectures = tuple(
        Architecture(name, _families(path), _gguf_names(name))
        for name, path in SUPPORTED_ARCHITECTURES.items()
    )
    return Supported(
        architectures=architectures,
        weight_formats=tuple(
            name for name in get_args(CheckpointFormat) if name != "dummy"
        ),  # no file's format
        gguf_types=_gguf_types(),
        quantization=tuple(name for name in METHODS if name != "gguf"),  # whose types are listed
        online_quantization=ONLINE_METHODS,
        rope_types=get_args(RopeType),
        dtypes=tuple(name for name in get_args(DType) if name != "auto"),
    )


def _families(path: str) -> str:
    """The first paragraph of the docstring of the module in "module:class", which is not imported."""
    module, _, _class = path.partition(":")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    with open(spec.origin, encoding="utf-8") as source:
        text = ast.get_docstring(ast.parse(source.read())) or ""
    return " ".join(text.split("\n\n")[0].split()).removesuffix(".")


def _gguf_names(architecture: str) -> tuple[str, ...]:
    from halimede.engine.loader.gguf_config import GGUF_ARCHITECTURES

    return tuple(name for name, (_, hf_name) in GGUF_ARCHITECTURES.items() if hf_name == architecture)


def _gguf_types() -> tuple[str, ...]:
    """Those that the gguf package dequantizes: it is asked about each, as the loader will ask."""
    import numpy as np
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    found = []
    with np.errstate(all="ignore"):
        for kind, (_, block_bytes) in GGML_QUANT_SIZES.items():
            try:
                dequantize(np.zeros((1, block_bytes), np.uint8), kind)
            except NotImplementedError:
                continue
            found.append(kind.name)
    return tuple(found)


def _other_rows(supported: Supported) -> list[tuple[str, str]]:
    return [
        ("weight formats", ", ".join(supported.weight_formats)),
        ("GGUF types", ", ".join(supported.gguf_types)),
        ("quantization", ", ".join(supported.quantization)),
        ("while loading", ", ".join(supported.online_quantization)),
        ("rope types", ", ".join(supported.rope_types)),
        ("data types", ", ".join(supported.dtypes)),
    ]


def _print_tables(supported: Supported) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for title in ("Architecture", "Families", "In a GGUF"):
        table.add_column(title, overflow="fold")
    for item in supported.architectures:
        table.add_row(item.name, item.families, ", ".join(item.gguf) or "-")
    others = Table(box=None, show_header=False, padding=(0, 2))
    others.add_column(no_wrap=True, style="bold")
    others.add_column()
    for row in _other_rows(supported):
        others.add_row(*row)
    console = Console(highlight=False)
    console.print(table)
    console.print(others)


def _print_lines(supported: Supported) -> None:
    """One line for each thing, tabs between its parts: for grep and cut."""
    for item in supported.architectures:
        print("architecture", item.name, item.families, ",".join(item.gguf), sep="\t")
    for name, values in _other_rows(supported):
        print(name, values, sep="\t")
