"""load_weights: packed and tied parameters, every mismatch, and no second copy in memory."""

import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import ClassVar, Self

import pytest
import torch
from memory_watch import WATCH
from safetensors.torch import save_file
from torch import nn

from halimede.engine.loader.host_memory import WeightMemory
from halimede.engine.loader.model_files import ModelFiles
from halimede.engine.loader.safetensors import SafetensorsWeights
from halimede.engine.loader.torch_bin import TorchBinWeights
from halimede.engine.loader.weights import load_weights, open_weights
from halimede.errors import ModelLoadError, UnsupportedQuantizationError


class FusedLinear(nn.Linear):
    def __init__(self, inputs: int, output_sizes: tuple[int, ...], bias: bool) -> None:
        super().__init__(inputs, sum(output_sizes), bias=bias)
        self.output_sizes = output_sizes


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = FusedLinear(4, (6, 2, 2), bias=True)
        self.o_proj = nn.Linear(6, 4, bias=False)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 4)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm = nn.RMSNorm(4)


class Model(nn.Module):
    packed_modules: ClassVar[Mapping[str, tuple[str, ...]]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
    ignored_weights: ClassVar[tuple[str, ...]] = (r"rotary_emb\.inv_freq$",)

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.model = Body()
        self.lm_head = nn.Linear(4, 10, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight


class DictWeights:
    """A source made of a dict; it counts what is read."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = dict(tensors)
        self.read: list[str] = []

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def where(self, name: str) -> str:
        return f"file-of-{name[0]}.safetensors"

    def get(self, name: str) -> torch.Tensor:
        self.read.append(name)
        return self.tensors[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        pass


def _checkpoint() -> dict[str, torch.Tensor]:
    shapes = {"model.embed_tokens.weight": (10, 4), "model.norm.weight": (4,), "lm_head.weight": (10, 4)}
    for i in range(2):
        prefix = f"model.layers.{i}"
        for part, rows in (("q_proj", 6), ("k_proj", 2), ("v_proj", 2)):
            shapes[f"{prefix}.{part}.weight"] = (rows, 4)
            shapes[f"{prefix}.{part}.bias"] = (rows,)
        shapes[f"{prefix}.o_proj.weight"] = (4, 6)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _load(
    tensors: Mapping[str, torch.Tensor], tied: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[Model, DictWeights]:
    with torch.device("meta"):
        model = Model(tied)
    source = DictWeights(tensors)
    load_weights(model, source, device=torch.device("cpu"), dtype=dtype, progress=False)
    return model, source


def _error(tensors: Mapping[str, torch.Tensor], tied: bool = False) -> str:
    with pytest.raises(ModelLoadError) as caught:
        _load(tensors, tied)
    return str(caught.value)


def test_every_parameter_is_filled() -> None:
    checkpoint = _checkpoint()
    model, source = _load(checkpoint)
    state = model.state_dict()
    for i in range(2):
        prefix = f"model.layers.{i}"
        for leaf in ("weight", "bias"):
            parts = [checkpoint[f"{prefix}.{part}.{leaf}"] for part in ("q_proj", "k_proj", "v_proj")]
            assert torch.equal(state.pop(f"{prefix}.qkv_proj.{leaf}"), torch.cat(parts))
    for name, tensor in state.items():
        assert torch.equal(tensor, checkpoint[name])
    assert all(not parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.data_ptr() % 64 == 0 for parameter in model.parameters())
    assert source.read == list(checkpoint)


def test_conversion_of_the_data_type() -> None:
    checkpoint = _checkpoint()
    model, _ = _load(checkpoint, dtype=torch.bfloat16)
    assert torch.equal(model.lm_head.weight, checkpoint["lm_head.weight"].bfloat16())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_what_a_model_says_of_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 1 if name.endswith("norm.weight") else tensor

    monkeypatch.setattr(Model, "float32_weights", (r"norm\.weight$",), raising=False)
    monkeypatch.setattr(Model, "convert_weight", staticmethod(convert), raising=False)
    checkpoint = _checkpoint()
    model, _ = _load(checkpoint, dtype=torch.bfloat16)
    assert torch.equal(model.model.norm.weight, checkpoint["model.norm.weight"] + 1)
    assert model.model.norm.weight.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, checkpoint["lm_head.weight"].bfloat16())


@pytest.mark.parametrize("inner", ["language_model.", "model.language_model."])
def test_the_text_part_of_a_model_that_sees(inner: str) -> None:
    """As published, everything behind language_model.; as transformers 5 has it, lm_head outside."""
    checkpoint = _checkpoint()
    model_prefix = "model." if inner.startswith("model") else ""
    renamed = {
        (
            inner + name.removeprefix(model_prefix) if name.startswith("model.") or not model_prefix else name
        ): t
        for name, t in checkpoint.items()
    }
    model, _ = _load(renamed)
    assert torch.equal(model.model.norm.weight, checkpoint["model.norm.weight"])
    assert torch.equal(model.lm_head.weight, checkpoint["lm_head.weight"])


@pytest.mark.parametrize("absent", ["lm_head.weight", "model.embed_tokens.weight", None])
def test_tied_parameters_stay_one_and_are_read_once(absent: str | None) -> None:
    checkpoint = _checkpoint()
    taken = "lm_head.weight" if absent == "model.embed_tokens.weight" else "model.embed_tokens.weight"
    expected = checkpoint[taken]
    checkpoint.pop(absent or "", None)
    model, source = _load(checkpoint, tied=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, expected)
    assert len({"lm_head.weight", "model.embed_tokens.weight"} & set(source.read)) == 1


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_wrapped_model_prefix(prefix: str) -> None:
    checkpoint = _checkpoint()
    model, _ = _load({prefix + name: tensor for name, tensor in checkpoint.items()})
    assert torch.equal(model.model.norm.weight, checkpoint["model.norm.weight"])


def test_base_model_without_its_prefix() -> None:
    checkpoint = _checkpoint()
    bare = {name.removeprefix("model."): tensor for name, tensor in checkpoint.items()}
    model, _ = _load(bare)
    assert torch.equal(
        model.get_parameter("model.layers.1.o_proj.weight"), checkpoint["model.layers.1.o_proj.weight"]
    )
    del bare["lm_head.weight"]
    model, _ = _load(bare, tied=True)
    assert torch.equal(model.lm_head.weight, checkpoint["model.embed_tokens.weight"])


def test_a_name_under_two_prefixes_is_unexpected() -> None:
    checkpoint = _checkpoint()
    checkpoint["norm.weight"] = torch.ones(4)
    assert "norm.weight" in _error(checkpoint)


def test_ignored_tensors_are_not_read() -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _, source = _load(_checkpoint() | {name: torch.ones(2)})
    assert name not in source.read


def test_missing_tensor() -> None:
    checkpoint = _checkpoint()
    del checkpoint["model.layers.1.k_proj.weight"]
    message = _error(checkpoint)
    assert "Model needs 1 tensors that the checkpoint lacks: model.layers.1.k_proj.weight" in message
    assert "file-of-m.safetensors" in message
    assert "file-of-l.safetensors" in message
    assert "download it again" in message


def test_many_missing_tensors_are_counted_not_listed() -> None:
    message = _error({"lm_head.weight": torch.ones(10, 4)})
    assert "needs 16 tensors" in message
    assert "and 11 more" in message


def test_missing_lm_head_tells_of_tying() -> None:
    checkpoint = _checkpoint()
    del checkpoint["lm_head.weight"]
    message = _error(checkpoint)
    assert "lm_head.weight" in message
    assert "tie_word_embeddings" in message


def test_unexpected_tensor() -> None:
    message = _error(_checkpoint() | {"model.layers.0.o_proj.bias": torch.ones(4)})
    assert (
        "1 tensors that Model has no place for: model.layers.0.o_proj.bias (file-of-m.safetensors)" in message
    )
    assert "config.json" in message


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.norm.weight", (5,), "(4,)"),
        ("model.layers.0.k_proj.weight", (6, 4), "(2, 4)"),
        ("model.layers.1.v_proj.bias", (2, 1), "(2,)"),
        ("lm_head.weight", (4, 10), "(10, 4)"),
        ("model.embed_tokens.weight", (1, 4), "(10, 4)"),
    ],
)
def test_wrong_shape(name: str, shape: tuple[int, ...], expected: str) -> None:
    message = _error(_checkpoint() | {name: torch.ones(shape)})
    assert (
        f"file-of-{name[0]}.safetensors: the tensor {name} has the shape {shape}, expected {expected}"
        in message
    )
    assert "config.json" in message
    assert "download both again" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_quantized_tensor_without_its_scales(dtype: torch.dtype) -> None:
    checkpoint = _checkpoint()
    checkpoint["model.layers.0.o_proj.weight"] = torch.zeros(4, 6).to(dtype)
    with pytest.raises(UnsupportedQuantizationError) as caught:
        _load(checkpoint)
    assert f"file-of-m.safetensors: the tensor model.layers.0.o_proj.weight is of type {dtype}" in str(
        caught.value
    )
    assert "bfloat16" in str(caught.value)


def test_out_of_device_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with torch.device("meta"):
        model = Model()
    monkeypatch.setattr(WeightMemory, "empty", refuse)
    source = DictWeights(_checkpoint())
    with pytest.raises(ModelLoadError) as caught:
        load_weights(model, source, device=torch.device("cpu"), dtype=torch.float32, progress=False)
    message = str(caught.value)
    assert "GiB in torch.float32" in message
    assert "smaller model" in message


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        model = Model()
    source = DictWeights(_checkpoint())
    load_weights(model, source, device=torch.device("cpu"), dtype=torch.float32, progress=True)
    assert "Loading weights: 100%" in capsys.readouterr().err


def test_open_weights_picks_the_reader(tmp_path: Path, smollm2_gguf: Path) -> None:
    checkpoint = _checkpoint()
    save_file(checkpoint, tmp_path / "model.safetensors")
    torch.save(checkpoint, tmp_path / "model.pt")
    readers = {}
    for format_, path in (
        ("safetensors", tmp_path / "model.safetensors"),
        ("torch_bin", tmp_path / "model.pt"),
        ("gguf", smollm2_gguf),
    ):
        files = ModelFiles("reference", format_, (path,), {}, "config.json")  # type: ignore[arg-type]
        with open_weights(files) as source:
            readers[format_] = type(source).__name__
            if format_ == "gguf":
                assert "model.embed_tokens.weight" in source.names()
                continue
            with torch.device("meta"):
                model = Model()
            load_weights(model, source, device=torch.device("cpu"), dtype=torch.float32, progress=False)
            assert torch.equal(model.lm_head.weight, checkpoint["lm_head.weight"])
    assert readers == {
        "safetensors": SafetensorsWeights.__name__,
        "torch_bin": TorchBinWeights.__name__,
        "gguf": "GgufWeights",
    }


# Loads `layers` matrices of 16 MiB, fused in pairs, while a thread watches the process's anonymous memory:
# mapped file pages do not count, the kernel drops them at will. Prints the peak in MiB.
_MEASURE = """
import sys
from pathlib import Path
import torch
from torch import nn
from halimede.engine.loader.host_memory import WeightMemory
from halimede.engine.loader.model_files import ModelFiles
from halimede.engine.loader.weights import load_weights, open_weights

class Fused(nn.Linear):
    output_sizes = (2048, 2048)

class Model(nn.Module):
    packed_modules = {"gate_up": ("gate", "up")}
    def __init__(self):
        super().__init__()
        layers = [nn.ModuleDict({"gate_up": Fused(2048, 4096, bias=False)}) for _ in range(6)]
        self.layers = nn.ModuleList(layers)

format, dtype, *paths = sys.argv[1:]
with torch.device("meta"):
    model = Model()
torch.ones(8).bfloat16()
base, peak, done = anonymous(), 0.0, False
watcher = threading.Thread(target=watch)
watcher.start()
with open_weights(ModelFiles("", format, tuple(map(Path, paths)), {}, "")) as source:
    load_weights(model, source, device=torch.device("cpu"), dtype=getattr(torch, dtype), progress=False)
done = True
watcher.join()
print(peak - base, anonymous() - base)
"""


@pytest.mark.parametrize(
    ("format_", "dtype", "allowed"),
    [
        ("safetensors", "float32", 205),
        ("safetensors", "bfloat16", 115),
        ("torch_bin", "float32", 205),
        ("legacy_bin", "float32", 390),  # a whole file at once, and what malloc keeps of the one before
    ],
)
def test_no_second_copy_in_memory(tmp_path: Path, format_: str, dtype: str, allowed: float) -> None:
    """192 MiB of weights in two files. Legacy files cannot be mapped: one is in memory at a time."""
    paths = []
    for i in range(2):
        layers = range(3 * i, 3 * i + 3)
        names = [f"layers.{layer}.{part}.weight" for layer in layers for part in ("gate", "up")]
        tensors = {name: torch.full((2048, 2048), 0.5) for name in names}
        paths.append(tmp_path / f"{i}.weights")
        if format_ == "safetensors":
            save_file(tensors, paths[-1])
        else:
            torch.save(tensors, paths[-1], _use_new_zipfile_serialization=format_ == "torch_bin")
    command = [
        sys.executable,
        "-c",
        WATCH + _MEASURE,
        "safetensors" if format_ == "safetensors" else "torch_bin",
        dtype,
    ]
    result = subprocess.run([*command, *map(str, paths)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    peak, after = map(float, result.stdout.split())
    weights = 192 if dtype == "float32" else 96
    assert after > weights - 5
    assert peak < allowed
