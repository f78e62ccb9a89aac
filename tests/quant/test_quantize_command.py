"""`halimede quantize`: what it writes is read by compressed-tensors, transformers and ourselves."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_checkpoints import TOKENS, generate, read_weights
from safetensors.torch import load_file
from tiny_models import load_model, run_model, write_tiny_checkpoint

from halimede.engine import quantize_checkpoint as module
from halimede.engine.cli.main import main
from halimede.engine.quant.online import online_scheme

Run = Callable[..., str]
SMALL = {"tokenizer": True, "intermediate_size": 128, "hidden_size": 64}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object, status: int = 0) -> str:
        with pytest.raises(SystemExit) as end:
            main(["quantize", *map(str, arguments)])
        printed = capsys.readouterr()
        assert end.value.code == status, printed
        return printed.out + printed.err

    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("plain"), **SMALL)  # type: ignore[arg-type]


def check_decompression(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """compressed-tensors makes of every module the very weights, in the type of their scales."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils import match_name

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(config).config_groups
    tensors = load_file(folder / "model.safetensors")
    for name, weight in expected.items():
        [scheme] = [
            group
            for group in groups.values()
            if any(target == "Linear" or match_name(name, target) for target in group.targets)
        ]
        stored = {
            key.removeprefix(f"{name}."): each for key, each in tensors.items() if key.startswith(f"{name}.")
        }
        stored["weight_scale"] = stored["weight_scale"].float()
        done = BaseCompressor.get_value_from_registry(config["format"]).decompress(stored, scheme)
        assert torch.equal(done["weight"].float(), weight), name


CASES = [
    ("int4", {}),
    ("int4", {"group_size": 32}),
    ("int4", {"group_size": 32, "symmetric": True}),
    ("int4", {"group_size": -1}),
    ("int8", {}),
    ("fp8", {}),
]


def flags(method: str, options: dict[str, Any]) -> list[str]:
    """Written without zero points unless one says so; quantized while loading with them."""
    size = ["--group-size", str(options["group_size"])] if "group_size" in options else []
    return [*size, *(["--no-symmetric"] if method == "int4" and not options.get("symmetric") else [])]


@pytest.mark.parametrize(("method", "options"), CASES)
def test_everyone_reads_the_same_weights(
    plain: Path, tmp_path: Path, run: Run, method: str, options: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pytest.importorskip("compressed_tensors")
    out = tmp_path / "out"
    printed = run(plain, "--to", method, "-o", out, *flags(method, options))
    assert " times smaller): " in printed
    assert not [path.name for path in tmp_path.iterdir() if path != out], "nothing is left beside it"
    expected = read_weights(plain, online_scheme(method, **options))
    ours = read_weights(out)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], weight) for name, weight in expected.items())
    check_decompression(out, expected)
    # transformers 5.24 with compressed-tensors 0.20 makes room for zero points that are not packed, and so
    # takes no checkpoint of packed weights that has some.
    if method != "int4" or options.get("symmetric"):
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
        with torch.inference_mode():
            logits = theirs.eval()(torch.tensor([TOKENS])).logits[0]
        actual = run_model(load_model(out), TOKENS)
        # It rounds activations to fp8, which we do not.
        apart = 0.05 if method == "fp8" else 1e-3
        assert (actual - logits).square().sum() < apart * logits.square().sum()
    assert len(generate(out)) == 8
    text = "The quick brown fox"
    assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(plain)(text)


def test_modules_of_other_groups_have_groups_of_their_own(tmp_path: Path, run: Run) -> None:
    model = write_tiny_checkpoint(tmp_path / "model", hidden_size=64, intermediate_size=256, shards=2)
    run(model, "--to", "int4", "-o", tmp_path / "out")
    groups = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["config_groups"]
    sizes = {tuple(group["targets"]): group["weights"]["group_size"] for group in groups.values()}
    assert sizes[(r"re:.*\.down_proj$",)] == 128
    expected = read_weights(model, online_scheme("int4", symmetric=True))
    assert all(torch.equal(weight, expected[name]) for name, weight in read_weights(tmp_path / "out").items())


def test_shards_with_an_index(plain: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    original = module.quantize_checkpoint
    monkeypatch.setattr(module, "quantize_checkpoint", lambda *a, **k: original(*a, **k, shard_bytes=100_000))
    run(plain, "--to", "fp8", "-o", tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    assert {name: path.name for path in files for name in load_file(path)} == index["weight_map"]
    assert len(generate(tmp_path / "out")) == 8


def test_torch_files(tmp_path: Path, run: Run, plain: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / "bin", format="bin", **SMALL)  # type: ignore[arg-type]
    run(other, "--to", "int4", "-o", tmp_path / "out")
    expected = read_weights(plain, online_scheme("int4", symmetric=True))
    assert all(torch.equal(weight, expected[name]) for name, weight in read_weights(tmp_path / "out").items())


def test_a_quantized_checkpoint_is_refused(plain: Path, tmp_path: Path, run: Run) -> None:
    run(plain, "--to", "int8", "-o", tmp_path / "out")
    printed = run(tmp_path / "out", "--to", "int4", "-o", tmp_path / "again", status=1)
    assert "quantized already (compressed-tensors); give one in float32, bfloat16 or float16" in printed
    assert not (tmp_path / "again").exists()


def test_what_is_there_is_not_replaced_unasked(plain: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    arguments = (plain, "--to", "fp8", "-o", out)
    run(*arguments)
    (out / "mine").write_text("")
    assert "is not empty; give another directory, or --overwrite" in run(*arguments, status=1)
    run(*arguments, "--overwrite")
    assert not (out / "mine").exists()
    (out / "config.json").unlink()
    assert "something other than a model" in run(*arguments, "--overwrite", status=1)
    copied = tmp_path / "model"
    shutil.copytree(plain, copied)
    message = run(copied, "--to", "fp8", "-o", copied, "--overwrite", status=1)
    assert "holds the model that is to be quantized" in message
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]


def test_a_run_that_fails_leaves_nothing(
    plain: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: full)
    assert "1000 are free" in run(plain, "--to", "int8", "-o", tmp_path / "out", status=1)
    assert not list(tmp_path.iterdir())


def test_wrong_usage_and_help(plain: Path, tmp_path: Path, run: Run) -> None:
    text = run("--help")
    assert all(word in text for word in ("--to", "--group-size", "--symmetric", "--overwrite", "int4"))
    assert "group_size=48 is not one of" in run(
        plain, "--to", "int4", "--group-size", 48, "-o", tmp_path / "out", status=1
    )
    assert "int3" in run(plain, "--to", "int3", "-o", tmp_path / "out", status=2)
