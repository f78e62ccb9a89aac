"""Writes a plain checkpoint again as a quantized one, as compressed-tensors has it (`halimede quantize`).

Tensors are read, quantized and written one after the other: memory holds one output shard. Their names stay.
All is written to a folder beside the one that is asked for, which takes its name at the end.
"""

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from halimede.engine.loader.checkpoint_files import CHAT_TEMPLATE_FILES, TOKENIZER_FILES
from halimede.engine.loader.mapping import plan_loading
from halimede.engine.loader.model_files import ModelFiles
from halimede.engine.loader.quantized import Part, find_quantized
from halimede.engine.loader.weights import WeightSource, check_complete, open_weights
from halimede.engine.models.config import ModelConfig
from halimede.engine.models.registry import build_model
from halimede.engine.quant.ct_writing import quantization_config, stored_tensors
from halimede.engine.quant.online import OnlineFormat, OnlineScheme
from halimede.errors import ConfigError, UnsupportedModelError, UnsupportedQuantizationError

SHARD_BYTES = 5_000_000_000
_COPIED = (
    *TOKENIZER_FILES,
    *CHAT_TEMPLATE_FILES,
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)


@dataclass(frozen=True, slots=True)
class Written:
    """A checkpoint that was written. Bytes are of the tensors."""

    folder: Path
    bytes_before: int
    bytes_after: int


def quantize_checkpoint(
    files: ModelFiles,
    scheme: OnlineScheme,
    folder: Path,
    *,
    overwrite: bool = False,
    progress: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Written:
    """Write the model of `files`, quantized, to `folder`.

    Raises ConfigError for a folder that may not be written to, UnsupportedQuantizationError for a checkpoint
    that is quantized already, ModelLoadError for one that cannot be read, OSError where the disk is full.
    """
    _check_output(files, folder, overwrite)
    config = ModelConfig.from_hf(files.config, files.config_source)
    if config.quantization is not None:
        raise UnsupportedQuantizationError(
            f"{files.config_source}: the checkpoint is quantized already ({config.quantization.method}); "
            "give one in float32, bfloat16 or float16"
        )
    _check_portable(files)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        part.chmod(0o755)  # mkdtemp's is the user's alone
        _write_others(files, part)  # first: a tokenizer that cannot be written is told at once
        writer = _Writer(part, shard_bytes)
        with open_weights(files) as source:
            job = _plan(config, scheme, source)
            with tqdm(
                total=len(source.names()), desc="Quantizing weights", unit="tensor", disable=not progress
            ) as bar:
                for tensors, size in _converted(job, source):
                    writer.add(tensors)
                    writer.bytes_before += size
                    bar.update()
        writer.finish()
        _write_json(part / "config.json", {**files.config, "quantization_config": job.config})
        _put_in_place(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return Written(folder, writer.bytes_before, writer.bytes_after)


def _check_output(files: ModelFiles, folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give the name of a directory that does not exist yet")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"{folder} is not empty; give another directory, or --overwrite to replace it")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds something other than a model, which is not replaced; give another")
    inside = folder.resolve()
    if any(inside in path.resolve().parents for path in files.weights):
        raise ConfigError(f"{folder} holds the model that is to be quantized; give another directory")


def _check_portable(files: ModelFiles) -> None:
    rope = files.config.get("rope_parameters")
    if isinstance(rope, dict) and rope.get("rope_type") == "factors":
        raise UnsupportedModelError(
            f"{files.config_source}: its rope factors (rope_freqs.weight) have no place in a config.json; "
            "quantize the original checkpoint, not its GGUF"
        )


@dataclass(frozen=True, slots=True)
class _Job:
    """What becomes of the checkpoint's tensors. parts: those to quantize, by the weight's name in it."""

    parts: dict[str, Part]
    formats: dict[str, OnlineFormat]
    config: dict[str, Any]


def _plan(config: ModelConfig, scheme: OnlineScheme, source: WeightSource) -> _Job:
    model = build_model(config)
    modules = find_quantized(model, scheme)
    plan = plan_loading(model, source.names(), modules)
    check_complete(model, plan, source)
    parts, formats, columns = {}, {}, {}
    for module in modules:
        for part in module.parts:
            format_ = scheme.format_of(part.name, "Linear")
            assert format_ is not None, "all parts of a module are in a layer"
            name = plan.parts[part.name]["weight"]
            parts[name], formats[name], columns[part.name] = part, format_, part.columns
    read = {*parts, *plan.slices}
    return _Job(parts, formats, quantization_config(scheme, columns, _other_models(source, read)))


def _other_models(source: WeightSource, read: set[str]) -> list[str]:
    """Expressions for the modules that are not the language model's, such as what sees: they stay plain."""
    tops = {
        name.removeprefix("model.").split(".")[0]
        for name in source.names()
        if name not in read and ".layers." in name
    }
    own = {name.removeprefix("model.").split(".")[0] for name in read}
    return [rf"re:.*{top}\..*" for top in sorted(tops - own)]


def _converted(job: _Job, source: WeightSource) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
    """Of each tensor of the checkpoint what is written, and the bytes that it had."""
    for name in source.names():
        if name not in job.parts:
            tensor = source.get(name)
            yield {name: tensor}, tensor.nbytes
            continue
        part, tensor = job.parts[name], source.get(name)
        only = {name: tensor}.__getitem__
        stored = part.stored({"weight": name}, only, source.where)
        tensors = stored_tensors(job.formats[name].convert(stored))
        module = name.removesuffix("weight")
        yield {f"{module}{suffix}": each for suffix, each in tensors.items()}, tensor.nbytes


class _Writer:
    """Gathers tensors into shards and writes each when it is full."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.bytes_before = self.bytes_after = 0
        self._folder, self._limit = folder, shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._size = 0
        self._shards: list[list[str]] = []

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Those of one module stay together."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._pending and self._size + size > self._limit:
            self._flush()
        self._pending |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._size += size
        self.bytes_after += size

    def finish(self) -> None:
        """Write the rest, and give the files the names that tell how many there are."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._path(0).rename(self._folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            file = f"model-{i + 1:05}-of-{count:05}.safetensors"
            self._path(i).rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.bytes_after}, "weight_map": weight_map}
        _write_json(self._folder / "model.safetensors.index.json", index)

    def _path(self, shard: int) -> Path:
        return self._folder / f"shard-{shard}"

    def _flush(self) -> None:
        free = shutil.disk_usage(self._folder).free
        if free < self._size:
            raise OSError(
                errno.ENOSPC,
                f"no space left: {self._size} bytes are to be written, {free} are free",
                str(self._folder),
            )
        path = self._path(len(self._shards))
        try:
            save_file(self._pending, path, metadata={"format": "pt"})
        except SafetensorError as error:  # it has no errno
            raise OSError(errno.EIO, f"cannot be written ({error}); is the disk full?", str(path)) from error
        path.chmod(0o644)  # safetensors makes its files the user's alone
        self._shards.append(list(self._pending))
        self._pending, self._size = {}, 0


def _write_others(files: ModelFiles, folder: Path) -> None:
    """Tokenizer, chat template and generation_config.json."""
    if files.format == "gguf":
        from halimede.engine.loader.gguf_tokenizer import load_gguf_tokenizer

        load_gguf_tokenizer(files.weights[0]).save_pretrained(folder)
        if files.generation_config:
            _write_json(folder / "generation_config.json", files.generation_config)
        return
    origin = Path(files.config_source).parent
    for pattern in _COPIED:
        for path in origin.glob(pattern):
            target = folder / path.relative_to(origin)
            if path.is_file() and not target.exists():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


def _put_in_place(part: Path, folder: Path) -> None:
    """Give the folder its name; what had it before goes once the new one is there."""
    if not folder.exists():
        part.rename(folder)
        return
    old = part.with_name(f"{part.name}-old")
    folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
