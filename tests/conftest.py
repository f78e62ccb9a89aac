"""Fixtures shared by every test."""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SMOLLM2 = REPOSITORY / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"

# Tests never reach a network; what they load is on disk or served on the loopback interface.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The suite is about the CPU path and gives the same result everywhere; name a GPU to let it use one.
for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
    os.environ.setdefault(variable, "")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files here first: they have the longest tests, with which one worker would be left at the end."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real model file that `make model` brings."""
    if not SMOLLM2.exists():
        pytest.fail(f"{SMOLLM2} is missing; run `make model` (or `make test`, which does)")
    return SMOLLM2


@pytest.fixture(scope="session")
def _num_frozen() -> Iterator[list[int]]:
    """How many modules were imported when garbage was last kept from being looked for in them."""
    yield [0]
    gc.unfreeze()  # or Triton's binding complains at the end of what it leaves behind


@pytest.fixture(autouse=True)
def _freeze_what_is_imported(_num_frozen: list[int]) -> None:
    """An engine collects garbage when it shuts down: 0.3 s in the objects of torch and transformers alone."""
    if len(sys.modules) > _num_frozen[0] + 200:
        gc.collect()
        gc.freeze()
        _num_frozen[0] = len(sys.modules)


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    logger = logging.getLogger("halimede")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers
