"""Reads the small JSON files that lie beside a checkpoint's weights."""

import json
from pathlib import Path
from typing import Any

from halimede.errors import ModelLoadError


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that a file holds. ModelLoadError where it cannot be read or holds something else."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read ({error}); check its rights") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ModelLoadError(f"{path} is not valid JSON ({error}); repair it or download it again") from error
    if not isinstance(content, dict):
        raise ModelLoadError(
            f"{path} holds a {type(content).__name__}, not a JSON object; repair it or download it again"
        )
    return content
