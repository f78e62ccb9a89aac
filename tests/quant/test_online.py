"""Plain checkpoints that are quantized while they are loaded."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_watch import WATCH
from safetensors.torch import save_file
from tiny_models import load_model, read_config, run_model, write_tiny_checkpoint

from halimede import ConfigError, ModelLoadError
from halimede.engine.loader.model_files import ModelFiles
from halimede.engine.loader.weights import load_weights, open_weights
from halimede.engine.models.base import CausalLM
from halimede.engine.models.registry import build_model
from halimede.engine.quant.canonical import Fp8Weight, GroupedWeight, Int8Weight
from halimede.engine.quant.online import ONLINE_METHODS, Int4Online, OnlineScheme, online_scheme
from halimede.engine.quant.stored import StoredModule

TOKENS = [1, 17, 300, 42, 5, 99, 256, 511, 3, 128, 77, 64, 210, 9, 31, 400, 12, 350, 2, 8]
# Of weights from a normal distribution: the squared error beside the squared weight; seen and a little.
LARGEST_ERROR = {"int4": 0.012, "int8": 1.2e-4, "fp8": 1.2e-3}


def stored(weight: torch.Tensor) -> StoredModule:
    name = "model.layers.0.mlp.up_proj"
    names = {"weight": f"{name}.weight"}
    return StoredModule(name, *weight.shape, names, lambda _: weight, lambda _: "model.safetensors")


def convert(scheme: OnlineScheme, weight: torch.Tensor) -> GroupedWeight | Int8Weight | Fp8Weight:
    return scheme.format.convert(stored(weight))


def sample(rows: int = 96, columns: int = 256) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", ONLINE_METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_near_what_they_were(method: str, dtype: torch.dtype) -> None:
    weight = sample().to(dtype)
    actual = convert(online_scheme(method), weight).dequantize()
    error = (actual - weight.float()).square().sum() / weight.float().square().sum()
    assert 0 < error < LARGEST_ERROR[method]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("asked", "columns", "size"), [(None, 256, 128), (None, 576, 64), (None, 96, 32)])
def test_int4_rounds_to_the_nearest_code(asked: int | None, columns: int, size: int, symmetric: bool) -> None:
    weight = sample(40, columns)
    actual = convert(online_scheme("int4", group_size=asked, symmetric=symmetric), weight)
    assert isinstance(actual, GroupedWeight)
    assert (actual.group_size, actual.zero == 8 if symmetric else True) == (size, True)
    scales = actual.scales.float().repeat_interleave(size, 1)
    off = (actual.dequantize() - weight).abs() / scales
    # The zero is rounded too, so an end may be off by one half more.
    assert off.max() <= 1.05
    assert (off <= 0.501).float().mean() > 0.95


@pytest.mark.parametrize(
    ("asked", "columns", "size"),
    [(128, 128, 128), (64, 256, 64), (128, 112, 112), (32, 96, 32), (-1, 256, 256), (256, 384, 128)],
)
def test_groups_are_the_largest_that_divide_the_columns(asked: int, columns: int, size: int) -> None:
    assert Int4Online(asked).group_of(columns) == size


@pytest.mark.parametrize("method", ONLINE_METHODS)
@pytest.mark.parametrize("value", [0.0, 1e-42, 3e38, -3e38])
def test_rows_of_extreme_numbers(method: str, value: float) -> None:
    weight = sample()
    weight[3] = value
    actual = convert(online_scheme(method), weight)
    assert torch.isfinite(actual.scales.float()).all()
    torch.testing.assert_close(actual.dequantize()[3], weight[3], rtol=0.02, atol=1e-30)


@pytest.mark.parametrize("method", ONLINE_METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_name_tensor_and_file(method: str, value: float) -> None:
    weight = sample()
    weight[5, 7] = value
    with pytest.raises(ModelLoadError, match=r"model.safetensors: .*up_proj.weight has numbers that are NaN"):
        convert(online_scheme(method), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ONLINE_METHODS)
def test_scales_are_the_same_in_every_type(method: str, dtype: torch.dtype) -> None:
    scales = convert(online_scheme(method), sample()).scales.float()
    assert torch.equal(scales, scales.to(dtype).float())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int3", {}), "'int3' is nothing that weights are quantized to: int4, int8, fp8"),
        (("int4", {"group_size": 48}), "group_size=48 is not one of"),
        (("int8", {"group_size": 64}), "int8 has a scale for each row"),
        (("fp8", {"symmetric": False}), "fp8 has no zero points"),
    ],
)
def test_wrong_settings(arguments: tuple[str, Mapping[str, Any]], message: str) -> None:
    name, options = arguments
    with pytest.raises(ConfigError, match=message):
        online_scheme(name, **options)


def load(path: Path, scheme: OnlineScheme, format: str = "safetensors") -> CausalLM:
    config = replace(read_config(path), quantization=scheme)
    model = build_model(config)
    suffix = "*.safetensors" if format == "safetensors" else "*.bin"
    files = ModelFiles(str(path), format, tuple(sorted(path.glob(suffix))), {}, str(path))  # type: ignore[arg-type]
    device = torch.device("cpu")
    with open_weights(files) as source:
        load_weights(model, source, device=device, dtype=torch.float32, progress=False, quantization=scheme)
    model.prepare(device, torch.float32, config.max_position_embeddings, backend=None)
    return model


@pytest.mark.parametrize("method", ["int4", "fp8"])
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_a_model_runs_as_the_one_of_its_dequantized_weights(tmp_path: Path, method: str, format: str) -> None:
    from safetensors.torch import load_file, save_file

    plain = write_tiny_checkpoint(tmp_path / "plain", intermediate_size=128, tie_word_embeddings=True)
    scheme = online_scheme(method)
    actual = run_model(load(plain, scheme), TOKENS)
    if format == "bin":
        path = write_tiny_checkpoint(
            tmp_path / "bin", format="bin", shards=2, intermediate_size=128, tie_word_embeddings=True
        )
        assert torch.equal(run_model(load(path, scheme, "torch_bin"), TOKENS), actual)
        return
    tensors = load_file(plain / "model.safetensors")
    quantized = {name for name, each in tensors.items() if ".layers." in name and each.dim() == 2}
    assert len(quantized) == 14
    changed = {name: convert(scheme, tensors[name]).dequantize() for name in quantized}
    save_file({**tensors, **changed}, plain / "model.safetensors")
    expected = run_model(load_model(plain), TOKENS)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


_PEAK = """
import sys
from pathlib import Path
import torch
from torch import nn
from halimede.engine.layers.linear import MergedLinear
from halimede.engine.loader.safetensors import SafetensorsWeights
from halimede.engine.loader.weights import load_weights
from halimede.engine.quant.online import online_scheme

class Model(nn.Module):
    packed_modules = {"gate_up": ("gate", "up")}
    def __init__(self):
        super().__init__()
        layers = [nn.ModuleDict({"gate_up": MergedLinear(2048, (2048, 2048), bias=False)}) for _ in range(6)]
        self.layers = nn.ModuleList(layers)

def load():
    with torch.device("meta"):
        model = Model()
    with SafetensorsWeights([Path(sys.argv[1])]) as source:
        load_weights(model, source, device=torch.device("cpu"), dtype=torch.bfloat16, progress=False,
                     quantization=online_scheme("int4"))
    return model

peak, done = 0.0, False
base = anonymous()
threading.Thread(target=watch).start()
model = load()
done = True
print(peak - base, anonymous() - base)
"""


def test_memory_holds_the_quantized_model_and_one_layer(tmp_path: Path) -> None:
    """192 MiB of weights in float32 become 28 MiB. One layer, 32 MiB in float32, passes through copies."""
    names = [f"layers.{layer}.{part}.weight" for layer in range(6) for part in ("gate", "up")]
    path = tmp_path / "model.safetensors"
    save_file({name: torch.randn(2048, 2048) for name in names}, path)
    command = [sys.executable, "-c", WATCH + _PEAK, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    peak, after = map(float, result.stdout.split())
    print(peak, after)
    assert after < 80
    assert peak < 150
