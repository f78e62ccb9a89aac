"""`halimede quantize MODEL --to int4 -o DIR`: writes a quantized checkpoint of a plain one."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from halimede.engine.cli.machine import format_bytes
from halimede.engine.cli.options import ModelArgument
from halimede.engine.quant.online_names import OnlineMethod


def quantize(
    model: ModelArgument,
    to: Annotated[
        OnlineMethod,
        typer.Option(
            "--to",
            help="int4: 4-bit codes in groups of columns. int8: int8 weights and activations (W8A8). "
            "fp8: float8_e4m3fn weights and activations.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory to write; it must not exist yet.")
    ],
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Columns that share a scale in int4: 32, 64, 128, 256, or -1 for all; default: 128."
        ),
    ] = None,
    symmetric: Annotated[
        bool,
        typer.Option(
            "--symmetric/--no-symmetric",
            help="int4 without zero points, which all engines read. With them it is more accurate, but "
            "transformers (5.24) does not load it.",
        ),
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint that is in the directory.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of MODEL on the hub.")] = None,
    hf_token: Annotated[str | None, typer.Option(help="Access token for gated models.")] = None,
    download_dir: Annotated[str | None, typer.Option(help="Where downloads go.")] = None,
) -> None:
    """Write MODEL, which is not quantized, as a quantized checkpoint.

    Linear modules of the decoder layers are rounded as they are, without calibration; embeddings and lm_head
    stay plain. The result is in compressed-tensors' format, for Halimede, vLLM and transformers. Nothing is
    there under its name until all is.
    """
    from halimede.engine.loader.resolve import resolve_model
    from halimede.engine.quant.online import online_scheme
    from halimede.engine.quantize_checkpoint import quantize_checkpoint

    scheme = online_scheme(to, group_size=group_size, symmetric=symmetric if to == "int4" else None)
    files = resolve_model(model, revision=revision, token=hf_token, download_dir=download_dir)
    done = quantize_checkpoint(files, scheme, output, overwrite=overwrite, progress=sys.stderr.isatty())
    ratio = done.bytes_before / max(done.bytes_after, 1)
    sizes = f"{format_bytes(done.bytes_before)} -> {format_bytes(done.bytes_after)}"
    print(f"{sizes} ({ratio:.2f} times smaller): {done.folder}")
