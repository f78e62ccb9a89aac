"""The option `quantization` against what the checkpoint says."""

from pathlib import Path

import pytest
from quantized_checkpoints import write_quantized
from test_awq import awq, config
from tiny_models import write_tiny_checkpoint

from halimede import LLM, ConfigError, EngineConfig, UnsupportedQuantizationError
from halimede.engine.build import open_model


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quantized(tmp_path_factory.mktemp("awq"), config(32), awq(32)).quantized


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("plain"), intermediate_size=128)


def method(path: Path, option: str | None) -> str | None:
    _, model = open_model(EngineConfig(model=str(path), quantization=option))
    return None if model.quantization is None else model.quantization.method


@pytest.mark.parametrize("option", [None, "awq", "AWQ", "awq_marlin"])
def test_the_checkpoint_says_how_it_is_quantized(quantized: Path, option: str | None) -> None:
    assert method(quantized, option) == "awq"


@pytest.mark.parametrize("option", [None, "int4", "int8", "fp8"])
def test_a_plain_checkpoint_is_quantized_as_the_option_says(plain: Path, option: str | None) -> None:
    assert method(plain, option) == option


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("gptq", r"quantization='gptq', but \S+config.json says that .* quantized with 'awq'"),
        ("int4", r"quantization='int4', but \S+config.json says that .* quantized with 'awq'"),
    ],
)
def test_another_method_than_the_checkpoints(quantized: Path, option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method(quantized, option)


def test_a_method_for_a_checkpoint_that_is_not_quantized(plain: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantization='awq', .* not quantized; .*: int4, int8, fp8"):
        LLM(str(plain), quantization="awq", device="cpu")


def test_a_method_that_is_not_known(plain: Path) -> None:
    with pytest.raises(
        UnsupportedQuantizationError, match=r"quantization='hqq' .* int4, int8, fp8; .*: awq,"
    ):
        LLM(str(plain), quantization="hqq", device="cpu")
