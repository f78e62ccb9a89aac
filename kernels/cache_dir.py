"""Where compiled kernels are kept if nobody says where."""

import os
from pathlib import Path

from halimede.errors import KernelCacheError

VARIABLE = "HALIMEDE_KERNEL_CACHE"


def default_kernel_cache_dir() -> Path:
    """HALIMEDE_KERNEL_CACHE if it is set, else $XDG_CACHE_HOME/halimede/kernels, else that in ~/.cache.

    Raises KernelCacheError: none of them is known, since the user has no home directory.
    """
    try:
        if named := os.environ.get(VARIABLE):
            return Path(named).expanduser()
        caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
        # XDG's rules: a relative path is not valid, and is ignored.
        root = caches if caches.is_absolute() else Path.home() / ".cache"
        return root / "halimede" / "kernels"
    except RuntimeError as error:
        raise KernelCacheError(
            f"there is no home directory for the kernel cache ({error}); set {VARIABLE} to a folder"
        ) from error
