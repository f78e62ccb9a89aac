"""The pause of the garbage collector ends however the block ends, and leaves one alone that is off."""

import gc
from collections.abc import Iterator

import pytest

from halimede.collection import pause_collection
from halimede.engine.config import EngineConfig
from halimede.engine.loader.model_files import ModelFiles
from halimede.engine.tokenizer import load_tokenizer
from halimede.errors import ModelLoadError


@pytest.fixture(autouse=True)
def _enabled() -> Iterator[None]:
    gc.enable()
    yield
    gc.enable()


def test_the_pause_ends_with_the_block() -> None:
    with pause_collection():
        assert not gc.isenabled()
        with pause_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_ends_with_an_error() -> None:
    with pytest.raises(KeyboardInterrupt), pause_collection():
        raise KeyboardInterrupt
    assert gc.isenabled()


def test_a_collector_that_is_off_stays_off() -> None:
    gc.disable()
    with pause_collection():
        pass
    assert not gc.isenabled()


def test_a_tokenizer_that_cannot_be_loaded_leaves_the_collector_on() -> None:
    files = ModelFiles(
        reference="m",
        format="dummy",
        weights=(),
        config={},
        config_source="config.json",
        generation_config={},
        tokenizer_path=None,
    )
    with pytest.raises(ModelLoadError):
        load_tokenizer(EngineConfig(model="m", tokenizer="nobody/nothing"), files)
    assert gc.isenabled()
