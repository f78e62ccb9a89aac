"""What the shell completes a model argument to. Runs at each press of Tab, so it imports next to nothing."""

import os
from pathlib import Path


def complete_model(incomplete: str) -> list[str]:
    """Ids of models in the Hugging Face cache, and what is in the directory, that begin so.

    Nothing where only paths fit: the shell then completes them itself, which it does better.
    """
    ids = [name for name in cached_model_ids() if name.startswith(incomplete)]
    return ids + _paths(incomplete) if ids else []


def cached_model_ids() -> list[str]:
    """Models that the Hugging Face cache holds (perhaps in part), sorted."""
    try:
        folders = os.listdir(hub_cache())
    except OSError:
        return []
    prefix = "models--"
    return sorted(name.removeprefix(prefix).replace("--", "/") for name in folders if name.startswith(prefix))


def hub_cache() -> Path:
    """Where huggingface_hub keeps its downloads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _paths(incomplete: str) -> list[str]:
    """Directories and .gguf files that begin so."""
    start = incomplete.rpartition("/")[2]
    prefix = incomplete.removesuffix(start)
    try:
        entries = sorted(Path(prefix or ".").expanduser().iterdir())
    except (OSError, RuntimeError):
        return []
    found = []
    for entry in entries:
        hidden = entry.name.startswith(".") and not start.startswith(".")
        if entry.name.startswith(start) and not hidden:
            if entry.is_dir():
                found.append(f"{prefix}{entry.name}/")
            elif entry.suffix == ".gguf":
                found.append(prefix + entry.name)
    return found
