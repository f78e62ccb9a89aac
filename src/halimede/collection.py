"""Keeps Python's garbage collector out of the parts that only build."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def pause_collection() -> Iterator[None]:
    """No search for reference cycles in the block, in any thread.

    Importing torch and transformers and reading a vocabulary make a million objects that stay, and the
    collector goes through all of them again and again for nothing: a tenth of the time. Not for where tensors
    are made: an old model that only a cycle holds on to must be freed before the new one fills the memory.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
