"""The benchmarks' model in the two forms that all engines read.

    python benchmarks/make_checkpoint.py

From a GGUF it writes a directory in Hugging Face's form (bfloat16 safetensors, configuration, tokenizer, chat
template) and a GGUF of bfloat16 matrices, so that every engine runs the same weights in the same precision.
"""

import argparse
import json
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
SOURCE = REPOSITORY / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
DIRECTORY = SOURCE.with_name("SmolLM2-135M-Instruct-bf16")
BF16_GGUF = SOURCE.with_name("SmolLM2-135M-Instruct.BF16.gguf")


def write_directory(source: Path, directory: Path) -> Path:
    """The GGUF's weights, dequantized and rounded to bfloat16, as a Hugging Face checkpoint."""
    import torch
    from safetensors.torch import save_file

    from halimede.engine.loader.gguf_tokenizer import load_gguf_tokenizer
    from halimede.engine.loader.resolve import resolve_model
    from halimede.engine.loader.weights import open_weights

    files = resolve_model(str(source))
    directory.mkdir(parents=True, exist_ok=True)
    with open_weights(files) as weights:
        tensors = {
            name: weights.get(name).to(torch.bfloat16).contiguous() for name in sorted(weights.names())
        }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer = load_gguf_tokenizer(source)
    tokenizer.save_pretrained(directory)
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    tokens = {name: value for name, value in tokens.items() if value is not None}
    config = {**files.config, **tokens, "dtype": "bfloat16"}
    config.pop("quantization_config", None)  # the GGUF's, whose weights are dequantized here
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", tokens)
    return directory


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def write_bf16_gguf(source: Path, path: Path) -> Path:
    """The same GGUF with every quantized matrix as bfloat16; vectors stay as they are."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
    from gguf.quants import dequantize, quantize

    reader = GGUFReader(source)
    written = path.with_name(path.name + ".part")
    writer = GGUFWriter(written, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, item = field.types[0], field.types[-1]
        is_array = kind == GGUFValueType.ARRAY
        writer.add_key_value(name, field.contents(), kind, item if is_array else None)
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    for tensor in reader.tensors:
        data = dequantize(tensor.data, tensor.tensor_type)
        if data.ndim > 1:
            bf16 = GGMLQuantizationType.BF16
            writer.add_tensor(tensor.name, quantize(data, bf16), raw_dtype=bf16)
        else:
            writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written.rename(path)


def main() -> None:
    """Write both forms."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source", type=Path, default=SOURCE, help="GGUF to read (default: what `make model` brings)"
    )
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="where the safetensors go")
    parser.add_argument("--gguf", type=Path, default=BF16_GGUF, help="where the bfloat16 GGUF goes")
    args = parser.parse_args()
    print(write_directory(args.source, args.directory))
    print(write_bf16_gguf(args.source, args.gguf))


if __name__ == "__main__":
    main()
