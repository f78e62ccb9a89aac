"""Which files of a directory, or of a repository on the hub, make up the checkpoint.

Works on file names alone, so that the hub's listing and a local directory are judged by the same rules.
"""

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType

from halimede.engine.config import LoadFormat
from halimede.engine.loader.model_files import CheckpointFormat
from halimede.errors import ModelLoadError

TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenization_*.py",
)
CHAT_TEMPLATE_FILES = ("chat_template*", "additional_chat_templates/*")
_LISTED = 20  # file names in an error message

# Weights in Mistral's or Meta's own layout, adapters, training state and other runtimes' models.
_NOT_WEIGHTS = re.compile(
    r"(consolidated|adapter_|training_args|optimizer|scheduler|scaler|rng_state|random_states|trainer_state"
    r"|openvino_|ggml|mmproj|imatrix).*",
    re.IGNORECASE,
)
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<suffix>\.\w+)")
_FORMATS: Mapping[LoadFormat, tuple[CheckpointFormat, ...]] = MappingProxyType(
    {
        "auto": ("safetensors", "torch_bin", "gguf"),
        "hf": ("safetensors", "torch_bin"),
        "safetensors": ("safetensors",),
        "pt": ("torch_bin",),
        "gguf": ("gguf",),
        "dummy": ("gguf",),  # for its configuration
    }
)
_PREFERRED_QUANTS = ("Q4_K_M", "Q8_0")


@dataclass(frozen=True, slots=True)
class WeightChoice:
    """The weight files to load: either `names`, in order, or those that the file `index` will name."""

    format: CheckpointFormat
    names: tuple[str, ...] = ()
    index: str | None = None


def choose_weights(
    names: Collection[str], source: str, quant: str | None = None, load_format: LoadFormat = "auto"
) -> WeightChoice:
    """Pick the weights among the file `names` (POSIX paths) of `source`, which is named in errors.

    Safetensors come before .bin and .pt, those before GGUF. Among several GGUFs `quant` picks by the name's
    suffix or the whole name; without it Q4_K_M is taken, else Q8_0, else the only one. A `load_format` other
    than auto leaves the other formats out of this; dummy takes none, where there is a config.json
    that auto would take, too.
    Raises ModelLoadError when nothing fits, shards are absent or several GGUFs are there to choose from.
    """
    if load_format == "dummy" and quant is None and "config.json" in names and not _only_gguf(names, source):
        return WeightChoice("dummy")
    formats = _FORMATS[load_format]
    if quant is not None and "gguf" not in formats:
        raise ModelLoadError(
            f"{source}: ':{quant}' picks a GGUF, which load_format={load_format!r} rules out; leave one out"
        )
    if quant is None:
        choice = _choose_unquantized(names, source, formats)
        if choice is not None:
            return choice
    if "gguf" not in formats:
        raise ModelLoadError(_nothing_found(names, source, load_format=load_format))
    ggufs = _group_shards(
        name for name in names if name.endswith(".gguf") and not _NOT_WEIGHTS.fullmatch(Path(name).name)
    )
    if not ggufs:
        raise ModelLoadError(_nothing_found(names, source, quant=quant, load_format=load_format))
    chosen = _choose_gguf(sorted(ggufs), source, quant)
    _check_numbers(ggufs[chosen], source)
    return WeightChoice("gguf", tuple(ggufs[chosen]))


def _only_gguf(names: Collection[str], source: str) -> bool:
    """Whether auto would take a GGUF, and with it the configuration in its metadata."""
    has_gguf = any(name.endswith(".gguf") for name in names)
    return has_gguf and _choose_unquantized(names, source, _FORMATS["hf"]) is None


def read_index(path: Path, present: Collection[str]) -> tuple[str, ...]:
    """The shards that an index names, each one checked to be among the `present` file names.

    Raises ModelLoadError when the index cannot be read or names an absent shard.
    """
    try:
        shards = sorted(set(map(str, json.loads(path.read_bytes())["weight_map"].values())))
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read ({error}); download it again") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelLoadError(
            f"{path} is not a valid index of shards ({type(error).__name__}: {error}); download it again"
        ) from error
    absent = [shard for shard in shards if shard not in present]
    if absent:
        raise ModelLoadError(
            f"{path} names {len(shards)} shards, of which {len(absent)} are absent: "
            f"{', '.join(absent[:_LISTED])}; the checkpoint is incomplete: download it again"
        )
    return tuple(shards)


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Those of the names that match one of the shell patterns."""
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def _choose_unquantized(
    names: Collection[str], source: str, formats: Collection[CheckpointFormat]
) -> WeightChoice | None:
    files: tuple[tuple[CheckpointFormat, str, tuple[str, ...]], ...] = (
        ("safetensors", "model.safetensors", (".safetensors",)),
        ("torch_bin", "pytorch_model.bin", (".bin", ".pt")),
    )
    for format_, whole, suffixes in files:
        if format_ not in formats:
            continue
        if whole in names:
            return WeightChoice(format_, (whole,))
        if f"{whole}.index.json" in names:
            return WeightChoice(format_, index=f"{whole}.index.json")
        loose = sorted(
            name
            for name in names
            if "/" not in name and name.endswith(suffixes) and not _NOT_WEIGHTS.fullmatch(name)
        )
        if loose:
            for shards in _group_shards(loose).values():
                _check_numbers(shards, source)
            return WeightChoice(format_, tuple(loose))
    return None


def _group_shards(names: Iterable[str]) -> dict[str, list[str]]:
    """File names by what they would be called unsharded, each group sorted."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        match = _SHARD.fullmatch(name)
        groups[match["stem"] + match["suffix"] if match else name].append(name)
    return dict(groups)


def _check_numbers(shards: Sequence[str], source: str) -> None:
    """Raise ModelLoadError when the numbers in the shards' names do not run from 1 to their total."""
    match = _SHARD.fullmatch(shards[0])
    if match is None:
        return
    total = match["total"]
    wanted = (f"{match['stem']}-{i + 1:05d}-of-{total}{match['suffix']}" for i in range(int(total)))
    absent = [name for name in wanted if name not in shards]
    if absent:
        raise ModelLoadError(
            f"{source} has {shards[0]} but lacks {', '.join(absent[:_LISTED])}: the checkpoint is "
            "incomplete; download it again"
        )


def _choose_gguf(groups: Sequence[str], source: str, quant: str | None) -> str:
    if quant is not None:
        fitting = [name for name in groups if _has_quant(name, quant)]
        if len(fitting) == 1:
            return fitting[0]
        found = f"has {len(fitting)} GGUF files that fit" if fitting else "has no GGUF file for"
        raise ModelLoadError(
            f"{source} {found} {quant!r}; give one of these file names in its place: {_listed(groups)}"
        )
    if len(groups) == 1:
        return groups[0]
    for preferred in _PREFERRED_QUANTS:
        fitting = [name for name in groups if _has_quant(name, preferred)]
        if len(fitting) == 1:
            return fitting[0]
    raise ModelLoadError(
        f"{source} has {len(groups)} GGUF files; say which one, for a repository as 'name:Q4_K_M', for a "
        f"directory by the file's path: {_listed(groups)}"
    )


def _has_quant(name: str, quant: str) -> bool:
    """Whether a GGUF's name ends in the quantization's (or is the file name itself), in any case."""
    stem = Path(name).name.lower().removesuffix(".gguf")
    wanted = quant.lower().removesuffix(".gguf")
    return stem == wanted or stem.endswith(tuple(separator + wanted for separator in "-._"))


def _nothing_found(
    names: Collection[str], source: str, *, quant: str | None = None, load_format: LoadFormat = "auto"
) -> str:
    if load_format not in ("auto", "dummy"):
        kinds = " or ".join(_FORMATS[load_format])
        return (
            f"{source} holds no weights that are {kinds}, as load_format={load_format!r} wants, only: "
            f"{_listed(sorted(names))}; leave load_format out"
        )
    if quant is not None:
        return f"{source} has no GGUF files for {quant!r} to choose from; leave ':{quant}' out"
    if any(Path(name).name.startswith("adapter_") for name in names):
        return (
            f"{source} holds an adapter (adapter_model), not a whole model; merge it into its base model and "
            "load that"
        )
    if any(name.startswith("consolidated") for name in names):
        return (
            f"{source} holds only consolidated weights, the layout of Mistral's and Meta's own code; use the "
            "version of the model in the Hugging Face layout"
        )
    if not names:
        return f"{source} holds no files; check that it is the right one and that its download was complete"
    return (
        f"{source} holds no weights (*.safetensors, *.bin, *.pt or *.gguf), only: "
        f"{_listed(sorted(names))}; check that it is the right one and that its download was "
        "complete"
    )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
