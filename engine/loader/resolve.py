"""Finds the files of a model: a directory, a .gguf file or a repository on the Hugging Face hub."""

import re
from pathlib import Path
from typing import Any

from halimede.engine.config import LoadFormat
from halimede.engine.loader.checkpoint_files import (
    TOKENIZER_FILES,
    WeightChoice,
    choose_weights,
    matching,
    read_index,
)
from halimede.engine.loader.hub import HubRepository
from halimede.engine.loader.json_file import read_json_object
from halimede.engine.loader.model_files import ModelFiles
from halimede.engine.loader.quant_config_files import add_quant_config
from halimede.errors import ModelLoadError

# owner/name or name, then perhaps a quantization or file name: owner/name:Q4_K_M
_HUB_REFERENCE = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<quant>[\w.-]+))?", re.ASCII)


def resolve_model(
    reference: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    download_dir: str | None = None,
    load_format: LoadFormat = "auto",
) -> ModelFiles:
    """Find, and from the hub download, the files of the model that `reference` names.

    A reference is a directory in the Hugging Face layout (or with GGUF files in it), the path of a .gguf
    file, or a repository on the hub, `owner/name`, where `owner/name:Q4_K_M` picks one of its GGUF files;
    for load_format="dummy" also a config.json alone. What exists here goes before the hub. `revision`,
    `token` and `download_dir` matter to the hub only.
    load_format: which files count as weights; for "dummy" they need not be there and are not downloaded.

    Raises ModelLoadError when the model cannot be found, had or understood.
    """
    try:
        path = Path(reference).expanduser()
        is_dir, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, a home directory that is unknown
        raise ModelLoadError(f"{reference!r} cannot be looked up ({error}); check the path") from error
    if is_dir:
        return _from_directory(reference, path, load_format)
    if is_file:
        return _from_file(reference, path, load_format)
    if _looks_like_path(reference):
        raise ModelLoadError(
            f"{reference} does not exist (looked in {Path.cwd()}); check the path, or give a Hugging Face id "
            "like owner/name"
        )
    match = _HUB_REFERENCE.fullmatch(reference)
    if match is None:
        raise ModelLoadError(
            f"{reference!r} is not the path of anything here, nor a Hugging Face id like owner/name or "
            "owner/name:Q4_K_M; check the spelling"
        )
    repository = HubRepository(match["name"], revision=revision, token=token, download_dir=download_dir)
    folder, choice = repository.fetch(match["quant"], load_format)
    return _assemble(reference, folder, choice, load_format)


def _from_file(reference: str, path: Path, load_format: LoadFormat) -> ModelFiles:
    if path.suffix == ".json" and load_format == "dummy":
        return ModelFiles(reference, "dummy", (), read_json_object(path), str(path))
    if path.suffix != ".gguf":
        raise ModelLoadError(
            f"{reference} is a file but not a .gguf; give the directory that it lies in, with its config.json"
        )
    if load_format not in ("auto", "gguf", "dummy"):
        raise ModelLoadError(
            f"{reference} is a GGUF, which load_format={load_format!r} rules out; leave load_format out"
        )
    return _from_gguf(reference, path, load_format)


def _looks_like_path(reference: str) -> bool:
    if reference.startswith((".", "/", "~")) or reference.count("/") > 1:
        return True
    return reference.endswith(".gguf") and ":" not in reference  # owner/name:file.gguf is the hub's


def _from_directory(reference: str, folder: Path, load_format: LoadFormat) -> ModelFiles:
    try:
        names = [path.name for path in folder.iterdir() if path.is_file()]
    except OSError as error:
        raise ModelLoadError(f"{folder} cannot be listed ({error}); check its rights") from error
    choice = choose_weights(names, str(folder), load_format=load_format)
    if choice.index is not None:
        choice = WeightChoice(choice.format, read_index(folder / choice.index, names))
    return _assemble(reference, folder, choice, load_format)


def _assemble(reference: str, folder: Path, choice: WeightChoice, load_format: LoadFormat) -> ModelFiles:
    if choice.format == "gguf":
        return _from_gguf(reference, folder / choice.names[0], load_format)
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise ModelLoadError(
            f"{config_path} is missing beside {choice.names[0]}; give a directory with the checkpoint's "
            "config.json"
        )
    files = (path.relative_to(folder).as_posix() for path in folder.iterdir())
    return ModelFiles(
        reference=reference,
        format=choice.format,
        weights=tuple(folder / name for name in choice.names),
        config=add_quant_config(folder, read_json_object(config_path)),
        config_source=str(config_path),
        generation_config=_read_generation_config(folder),
        tokenizer_path=folder if matching(files, TOKENIZER_FILES) else None,
    )


def _read_generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return read_json_object(path) if path.is_file() else {}


def _from_gguf(reference: str, path: Path, load_format: LoadFormat) -> ModelFiles:
    from halimede.engine.loader.gguf import find_gguf_shards, read_gguf_config

    shards = find_gguf_shards(path)
    return ModelFiles(
        reference=reference,
        format="dummy" if load_format == "dummy" else "gguf",
        weights=() if load_format == "dummy" else shards,
        config=read_gguf_config(shards),
        config_source=str(path),
        generation_config=_read_generation_config(path.parent),
        tokenizer_path=shards[0],
    )
