"""Checks that every weight file has to pass, whatever its format."""

from collections.abc import Iterable
from pathlib import Path

from halimede.errors import ModelLoadError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_is_weight_file(path: Path) -> None:
    """Raise ModelLoadError when `path` is missing, unreadable, empty or only a git-lfs pointer."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except FileNotFoundError:
        raise ModelLoadError(f"{path} is missing; download the checkpoint again") from None
    except OSError as error:
        raise ModelLoadError(
            f"{path} cannot be read ({error.strerror or error}); check it and its rights"
        ) from error
    if not start:
        raise ModelLoadError(f"{path} is empty; download it again")
    if start == _LFS_POINTER:
        raise ModelLoadError(
            f"{path} is a git-lfs pointer, not the weights; run `git lfs pull` in {path.parent}, or download "
            "it again"
        )


def locate_tensors(shards: Iterable[tuple[Path, Iterable[str]]]) -> dict[str, Path]:
    """The file that each tensor lies in, in the order of the files and of the names within them.

    Raises ModelLoadError when two files hold a tensor of the same name.
    """
    located: dict[str, Path] = {}
    for path, names in shards:
        for name in names:
            if name in located:
                raise ModelLoadError(
                    f"the tensor {name!r} is both in {located[name].name} and in {path.name} of "
                    f"{path.parent}; remove the file that does not belong to the checkpoint"
                )
            located[name] = path
    return located
