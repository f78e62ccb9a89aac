"""resolve_model on what lies on disk: which files are chosen, and what is said when they are not there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from halimede.engine.config import LoadFormat
from halimede.engine.loader.resolve import resolve_model
from halimede.errors import ModelLoadError

CONFIG = {"architectures": ["LlamaForCausalLM"]}
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def _directory(path: Path, *names: str, config: str | None = json.dumps(CONFIG)) -> Path:
    path.mkdir(exist_ok=True)
    for name in names:
        (path / name).write_bytes(b"content")
    if config is not None:
        (path / "config.json").write_text(config)
    return path


def _index(folder: Path, shards: list[str], name: str = "model.safetensors.index.json") -> None:
    content = {"metadata": {}, "weight_map": {f"tensor{i}": shard for i, shard in enumerate(shards)}}
    (folder / name).write_text(json.dumps(content))


def _error(reference: Path | str) -> str:
    with pytest.raises(ModelLoadError) as caught:
        resolve_model(str(reference))
    return str(caught.value)


@pytest.mark.parametrize(
    ("there", "format_", "expected"),
    [
        (["model.safetensors", "pytorch_model.bin"], "safetensors", ["model.safetensors"]),
        (["model.safetensors", "model.fp16.safetensors"], "safetensors", ["model.safetensors"]),
        (["model.safetensors", "consolidated.safetensors"], "safetensors", ["model.safetensors"]),
        ([*SHARDS, "consolidated.safetensors", "adapter_model.safetensors"], "safetensors", SHARDS),
        (["weights.safetensors", "model.Q8_0.gguf"], "safetensors", ["weights.safetensors"]),
        (["pytorch_model.bin", "training_args.bin", "model.Q8_0.gguf"], "torch_bin", ["pytorch_model.bin"]),
        (["optimizer.pt", "scheduler.pt", "rng_state.pth", "mine.pt"], "torch_bin", ["mine.pt"]),
        (["adapter_model.safetensors", "pytorch_model.bin"], "torch_bin", ["pytorch_model.bin"]),
        (
            ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
            "torch_bin",
            ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
        ),
    ],
)
def test_weights_of_a_directory(tmp_path: Path, there: list[str], format_: str, expected: list[str]) -> None:
    files = resolve_model(str(_directory(tmp_path / "m", *there)))
    assert files.format == format_
    assert files.weights == tuple(tmp_path / "m" / name for name in expected)
    assert files.config == CONFIG
    assert files.config_source == str(tmp_path / "m" / "config.json")
    assert files.generation_config == {}
    assert files.tokenizer_path is None
    assert files.reference == str(tmp_path / "m")


@pytest.mark.parametrize(
    ("load_format", "expected"),
    [
        ("auto", "model.safetensors"),
        ("hf", "model.safetensors"),
        ("safetensors", "model.safetensors"),
        ("pt", "pytorch_model.bin"),
    ],
)
def test_load_format_leaves_other_files_out(tmp_path: Path, load_format: LoadFormat, expected: str) -> None:
    folder = _directory(tmp_path, "model.safetensors", "pytorch_model.bin", "model.Q8_0.gguf")
    files = resolve_model(str(folder), load_format=load_format)
    assert [path.name for path in files.weights] == [expected]


def test_load_format_that_nothing_has(tmp_path: Path) -> None:
    folder = _directory(tmp_path / "m", "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"no weights that are torch_bin.*'pt'.*model\.safetensors"):
        resolve_model(str(folder), load_format="pt")
    with pytest.raises(ModelLoadError, match=r"load_format='gguf'"):
        resolve_model(str(folder), load_format="gguf")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match=r"is a GGUF, which load_format='safetensors' rules out"):
        resolve_model(str(tmp_path / "m.gguf"), load_format="safetensors")


def test_gguf_and_dummy_of_a_gguf(tmp_path: Path, smollm2_gguf: Path) -> None:
    folder = _directory(tmp_path, "model.safetensors")
    (folder / "model.gguf").symlink_to(smollm2_gguf)
    files = resolve_model(str(folder), load_format="gguf")
    assert (files.format, files.weights) == ("gguf", (folder / "model.gguf",))
    dummy = resolve_model(str(smollm2_gguf), load_format="dummy")
    assert (dummy.format, dummy.weights, dummy.config) == ("dummy", (), files.config)
    assert dummy.tokenizer_path == smollm2_gguf


def test_dummy_needs_only_a_config(tmp_path: Path) -> None:
    folder = _directory(tmp_path)
    files = resolve_model(str(folder), load_format="dummy")
    assert (files.format, files.weights, files.config) == ("dummy", (), CONFIG)
    assert files.tokenizer_path is None


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_index_decides_which_shards_belong(tmp_path: Path, suffix: str) -> None:
    name = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[suffix]
    folder = _directory(tmp_path, f"a.{suffix}", f"b.{suffix}", f"other.{suffix}")
    _index(folder, [f"b.{suffix}", f"a.{suffix}", f"b.{suffix}"], f"{name}.index.json")
    assert [path.name for path in resolve_model(str(folder)).weights] == [f"a.{suffix}", f"b.{suffix}"]


def test_tokenizer_and_generation_config(tmp_path: Path) -> None:
    folder = _directory(tmp_path, "model.safetensors", "tokenizer.json")
    (folder / "generation_config.json").write_text('{"top_p": 0.9}')
    files = resolve_model(str(folder))
    assert files.tokenizer_path == folder
    assert files.generation_config == {"top_p": 0.9}


def test_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _directory(tmp_path / "m", "model.safetensors")
    assert resolve_model("~/m").weights == (tmp_path / "m" / "model.safetensors",)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_index_naming_an_absent_shard(tmp_path: Path, name: str) -> None:
    folder = _directory(tmp_path, SHARDS[0], SHARDS[2])
    _index(folder, SHARDS, name)
    if name.startswith("pytorch"):
        for shard in (SHARDS[0], SHARDS[2]):
            (folder / shard).unlink()
        _index(folder, [SHARDS[1]], name)
    message = _error(folder)
    assert str(folder / name) in message
    assert SHARDS[1] in message
    assert "1 are absent" in message
    assert "download it again" in message


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": ["a"]}', "{}"])
def test_broken_index(tmp_path: Path, content: str) -> None:
    folder = _directory(tmp_path, *SHARDS)
    (folder / "model.safetensors.index.json").write_text(content)
    message = _error(folder)
    assert str(folder / "model.safetensors.index.json") in message
    assert "is not a valid index" in message
    assert "download it again" in message


def test_numbered_shard_that_is_absent_without_an_index(tmp_path: Path) -> None:
    message = _error(_directory(tmp_path, SHARDS[0], SHARDS[2]))
    assert f"{tmp_path} has {SHARDS[0]} but lacks {SHARDS[1]}" in message
    assert "download it again" in message


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["{'a': 1}", "\x00\ufffd", ""])
def test_config_that_is_not_json(tmp_path: Path, name: str, content: str) -> None:
    folder = _directory(tmp_path, "model.safetensors")
    (folder / name).write_text(content)
    message = _error(folder)
    assert f"{folder / name} is not valid JSON" in message
    assert "repair it or download it again" in message


def test_config_that_is_no_object(tmp_path: Path) -> None:
    message = _error(_directory(tmp_path, "model.safetensors", config="[1]"))
    assert "config.json holds a list, not a JSON object" in message


def test_missing_config(tmp_path: Path) -> None:
    message = _error(_directory(tmp_path, "model.safetensors", config=None))
    assert f"{tmp_path / 'config.json'} is missing beside model.safetensors" in message
    assert "give a directory" in message


def test_directory_without_weights(tmp_path: Path) -> None:
    message = _error(_directory(tmp_path, "tokenizer.json", "training_args.bin"))
    assert f"{tmp_path} holds no weights" in message
    assert "config.json, tokenizer.json, training_args.bin" in message
    assert "check that" in message


def test_adapter_alone(tmp_path: Path) -> None:
    message = _error(_directory(tmp_path, "adapter_config.json", "adapter_model.safetensors"))
    assert "holds an adapter" in message
    assert "merge it into its base model" in message


@pytest.mark.parametrize("name", ["consolidated.safetensors", "consolidated.00.pth"])
def test_consolidated_weights_alone(tmp_path: Path, name: str) -> None:
    message = _error(_directory(tmp_path, name))
    assert "consolidated" in message
    assert "Hugging Face layout" in message


@pytest.mark.parametrize(
    "reference", ["./absent", "/absent/model", "~/absent", "some/where/absent", "absent.gguf"]
)
def test_path_that_does_not_exist(reference: str) -> None:
    message = _error(reference)
    assert f"{reference} does not exist" in message
    assert "check the path" in message


@pytest.mark.parametrize("reference", ["org name", "org/name:Q4:K", "org/na\u00efve", "name:"])
def test_neither_path_nor_id(reference: str) -> None:
    message = _error(reference)
    assert repr(reference) in message
    assert "owner/name:Q4_K_M" in message


def test_file_that_is_not_a_gguf(tmp_path: Path) -> None:
    folder = _directory(tmp_path, "model.safetensors")
    message = _error(folder / "model.safetensors")
    assert "is a file but not a .gguf" in message
    assert "directory" in message


def test_real_gguf_file_and_directory_with_one(tmp_path: Path, smollm2_gguf: Path) -> None:
    files = resolve_model(str(smollm2_gguf))
    assert files.format == "gguf"
    assert files.weights == (smollm2_gguf,)
    assert files.tokenizer_path == smollm2_gguf
    assert files.config["architectures"] == ["LlamaForCausalLM"]
    assert files.config_source == str(smollm2_gguf)
    (tmp_path / "one.gguf").symlink_to(smollm2_gguf)
    (tmp_path / "generation_config.json").write_text('{"top_k": 5}')
    in_directory = resolve_model(str(tmp_path))
    assert in_directory.weights == (tmp_path / "one.gguf",)
    assert in_directory.config == files.config
    assert in_directory.generation_config == {"top_k": 5}


def test_several_ggufs_in_a_directory(tmp_path: Path) -> None:
    message = _error(_directory(tmp_path, "a.Q2_K.gguf", "a.Q3_K.gguf"))
    assert f"{tmp_path} has 2 GGUF files" in message
    assert "a.Q2_K.gguf, a.Q3_K.gguf" in message
    assert "by the file's path" in message


@pytest.mark.parametrize("whole", [True, False])
def test_sharded_gguf_that_is_incomplete(tmp_path: Path, whole: bool) -> None:
    folder = _directory(tmp_path, "m-00001-of-00002.gguf")
    message = _error(folder if whole else folder / "m-00001-of-00002.gguf")
    assert "m-00002-of-00002.gguf" in message


def test_local_models_need_no_hub_client(tmp_path: Path) -> None:
    folder = _directory(tmp_path, "model.safetensors")
    script = (
        "import sys; from halimede.engine.loader.resolve import resolve_model; "
        f"resolve_model({str(folder)!r}); print('huggingface_hub' in sys.modules, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_dummy_of_a_config_alone(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text(json.dumps(CONFIG))
    files = resolve_model(str(path), load_format="dummy")
    assert (files.format, files.weights, files.config) == ("dummy", (), CONFIG)
    with pytest.raises(ModelLoadError, match=r"is a file but not a \.gguf"):
        resolve_model(str(path))


def test_dummy_takes_its_configuration_from_where_auto_does(tmp_path: Path, smollm2_gguf: Path) -> None:
    """A directory with a config.json and GGUF weights runs by the GGUF's metadata."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.gguf").symlink_to(smollm2_gguf)
    assert resolve_model(str(tmp_path), load_format="dummy").config == resolve_model(str(tmp_path)).config
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve_model(str(tmp_path), load_format="dummy").config == CONFIG
