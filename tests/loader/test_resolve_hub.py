"""resolve_model against a hub served on the loopback interface: what is fetched, the cache, every refusal."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from fake_hub import COMMIT, FakeHub, Refusal
from huggingface_hub import constants

from halimede.engine.loader.model_files import ModelFiles
from halimede.engine.loader.resolve import resolve_model
from halimede.errors import ModelLoadError

CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": 8}
SAFETENSORS = {
    "config.json": json.dumps(CONFIG).encode(),
    "generation_config.json": b'{"temperature": 0.6}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{ }",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"the same again",
    "consolidated.safetensors": b"the same in another layout",
    "onnx/model.onnx": b"another runtime's",
    "README.md": b"words",
}
SHARDED = {
    "config.json": json.dumps(CONFIG).encode(),
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "first.safetensors", "b": "2.safetensors"}}
    ).encode(),
    "first.safetensors": b"1",
    "2.safetensors": b"2",
    "unused.safetensors": b"3",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub({"org/name": dict(SAFETENSORS), "org/sharded": dict(SHARDED)}) as hub:
        _go_online(hub.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield hub
    huggingface_hub.close_session()


def _go_online(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the hub's client, which read its environment when it was imported, at `url`."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    huggingface_hub.close_session()


def _unplug(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens on port 9 here: connections are refused, as with a network that is down."""
    _go_online("http://127.0.0.1:9", monkeypatch)


def _error(reference: str, **options: str) -> str:
    with pytest.raises(ModelLoadError) as caught:
        resolve_model(reference, **options)
    return str(caught.value)


def _names(files: ModelFiles) -> list[str]:
    return [path.name for path in files.weights]


def test_fetches_only_what_is_needed(hub: FakeHub) -> None:
    files = resolve_model("org/name")
    assert files.format == "safetensors"
    assert _names(files) == ["model.safetensors"]
    assert files.weights[0].read_bytes() == b"weights"
    assert files.config == CONFIG
    assert files.config_source.endswith("config.json")
    assert files.generation_config == {"temperature": 0.6}
    assert files.tokenizer_path == files.weights[0].parent
    assert files.reference == "org/name"
    expected = {"config.json", "generation_config.json", "model.safetensors"}
    expected |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert set(hub.downloaded) == expected


def test_nothing_is_fetched_twice(hub: FakeHub) -> None:
    resolve_model("org/name")
    hub.downloaded.clear()
    resolve_model("org/name")
    assert hub.downloaded == []


def test_name_without_owner(hub: FakeHub) -> None:
    hub.repositories["name"] = dict(SAFETENSORS)
    assert _names(resolve_model("name")) == ["model.safetensors"]


def test_shards_are_those_of_the_index(hub: FakeHub) -> None:
    files = resolve_model("org/sharded")
    assert _names(files) == ["2.safetensors", "first.safetensors"]
    assert "unused.safetensors" not in hub.downloaded
    assert files.tokenizer_path is None
    assert files.generation_config == {}


def test_index_naming_a_shard_that_the_repository_lacks(hub: FakeHub) -> None:
    del hub.repositories["org/sharded"]["2.safetensors"]
    message = _error("org/sharded")
    assert "model.safetensors.index.json names 2 shards, of which 1 are absent: 2.safetensors" in message
    assert "first.safetensors" not in hub.downloaded


def test_dummy_downloads_no_weights(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    files = resolve_model("org/name", load_format="dummy")
    assert (files.format, files.weights, files.config) == ("dummy", (), CONFIG)
    assert files.generation_config == {"temperature": 0.6}
    assert files.tokenizer_path is not None
    assert not any("model.safetensors" in path or path.endswith(".bin") for path in hub.downloaded)
    hub.api_refusals["org/name"] = Refusal(500)
    assert resolve_model("org/name", load_format="dummy") == files


def test_load_format_of_a_repository(hub: FakeHub) -> None:
    assert _names(resolve_model("org/name", load_format="pt")) == ["pytorch_model.bin"]
    with pytest.raises(ModelLoadError, match=r"':Q8_0' picks a GGUF, which load_format='pt' rules out"):
        resolve_model("org/name:Q8_0", load_format="pt")


def test_bin_only(hub: FakeHub) -> None:
    del hub.repositories["org/name"]["model.safetensors"]
    files = resolve_model("org/name")
    assert files.format == "torch_bin"
    assert _names(files) == ["pytorch_model.bin"]


def test_token_revision_and_download_dir_are_passed_on(hub: FakeHub, tmp_path: Path) -> None:
    hub.revisions = ("v2", COMMIT)
    files = resolve_model(
        "org/name", revision="v2", token="hf_secret", download_dir=str(tmp_path / "elsewhere")
    )
    assert (tmp_path / "elsewhere") in files.weights[0].parents
    assert hub.tokens == {"Bearer hf_secret"}
    assert not (tmp_path / "cache").exists()


def test_a_local_directory_goes_before_the_hub(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = tmp_path / "org" / "name"
    local.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (local / name).write_bytes(SAFETENSORS[name])
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name").weights == (Path("org/name/model.safetensors"),)
    assert hub.tokens == set()


@pytest.fixture
def gguf_repo(hub: FakeHub) -> dict[str, bytes]:
    names = [
        "SmolLM2-Q2_K.gguf",
        "SmolLM2-Q4_K_M.gguf",
        "SmolLM2-Q8_0.gguf",
        "SmolLM2-F16.gguf",
        "mmproj-F16.gguf",
    ]
    files = {name: name.encode() for name in names} | {"README.md": b"words", "config.json": b"{}"}
    hub.repositories["org/gguf"] = files
    return files


@pytest.fixture
def fake_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    """GGUF metadata is another module's matter: here only the choice of the file counts."""
    monkeypatch.setattr("halimede.engine.loader.gguf.read_gguf_config", lambda paths: CONFIG)


@pytest.mark.usefixtures("fake_gguf")
@pytest.mark.parametrize(
    ("suffix", "removed", "expected"),
    [
        ("", (), "SmolLM2-Q4_K_M.gguf"),
        ("", ("Q4_K_M",), "SmolLM2-Q8_0.gguf"),
        ("", ("Q4_K_M", "Q8_0", "F16"), "SmolLM2-Q2_K.gguf"),
        (":q8_0", (), "SmolLM2-Q8_0.gguf"),
        (":Q2_K", (), "SmolLM2-Q2_K.gguf"),
        (":f16", (), "SmolLM2-F16.gguf"),
        (":SmolLM2-F16.gguf", (), "SmolLM2-F16.gguf"),
    ],
)
def test_gguf_of_a_repository(
    hub: FakeHub, gguf_repo: dict[str, bytes], suffix: str, removed: tuple[str, ...], expected: str
) -> None:
    for quant in removed:
        del gguf_repo[f"SmolLM2-{quant}.gguf"]
    files = resolve_model(f"org/gguf{suffix}")
    assert files.format == "gguf"
    assert _names(files) == [expected]
    assert files.tokenizer_path == files.weights[0]
    assert files.config == CONFIG
    assert hub.downloaded == [expected]


@pytest.mark.usefixtures("fake_gguf")
def test_sharded_gguf_in_a_folder(hub: FakeHub, gguf_repo: dict[str, bytes]) -> None:
    shards = [f"BF16/SmolLM2-BF16-0000{i}-of-00002.gguf" for i in (1, 2)]
    gguf_repo.update({shard: shard.encode() for shard in shards})
    files = resolve_model("org/gguf:BF16")
    assert _names(files) == [Path(shard).name for shard in shards]
    assert sorted(hub.downloaded) == shards


@pytest.mark.usefixtures("gguf_repo")
def test_gguf_quantization_that_is_not_there(hub: FakeHub) -> None:
    message = _error("org/gguf:Q5_K_M")
    assert "org/gguf has no GGUF file for 'Q5_K_M'" in message
    assert "SmolLM2-Q4_K_M.gguf" in message
    assert hub.downloaded == []


def test_gguf_choice_that_cannot_be_made(hub: FakeHub, gguf_repo: dict[str, bytes]) -> None:
    del gguf_repo["SmolLM2-Q4_K_M.gguf"]
    del gguf_repo["SmolLM2-Q8_0.gguf"]
    message = _error("org/gguf")
    assert "org/gguf has 2 GGUF files; say which one" in message
    assert "SmolLM2-F16.gguf, SmolLM2-Q2_K.gguf" in message
    assert "name:Q4_K_M" in message


@pytest.mark.usefixtures("hub")
def test_quantization_of_a_repository_without_gguf() -> None:
    message = _error("org/name:Q4_K_M")
    assert "org/name has no GGUF files" in message
    assert "leave ':Q4_K_M' out" in message


@pytest.mark.parametrize("offline", [False, True], ids=["network down", "HF_HUB_OFFLINE"])
def test_cached_snapshot_without_a_network(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, offline: bool
) -> None:
    online = [resolve_model("org/name"), resolve_model("org/sharded")]
    _unplug(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with caplog.at_level(logging.INFO if offline else logging.WARNING, "halimede"):
        assert [resolve_model("org/name"), resolve_model("org/sharded")] == online
    assert "org/name: using the snapshot in" in caplog.text
    assert ("OfflineModeIsEnabled" if offline else "ConnectError") in caplog.text


@pytest.mark.usefixtures("fake_gguf", "gguf_repo")
def test_cached_gguf_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    online = resolve_model("org/gguf:Q8_0")
    _unplug(monkeypatch)
    assert resolve_model("org/gguf:Q8_0") == online
    message = _error("org/gguf:Q2_K")
    assert "no GGUF file for 'Q2_K'" in message
    assert "cached copy" in message
    assert "connect to the network" in message


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("offline", [False, True], ids=["network down", "HF_HUB_OFFLINE"])
def test_no_network_and_not_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, offline: bool) -> None:
    _unplug(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    message = _error("org/name")
    assert "org/name at http://127.0.0.1:9 cannot be downloaded" in message
    assert str(tmp_path / "cache") in message
    for remedy in ("network", "HF_HUB_OFFLINE", "local directory", "HF_HOME"):
        assert remedy in message


def test_cached_in_part_and_no_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = resolve_model("org/name")
    cached.weights[0].unlink()
    _unplug(monkeypatch)
    message = _error("org/name")
    assert "holds no weights" in message
    assert "cached copy" in message
    assert "connect to the network" in message


def test_cached_in_part_and_access_lost(hub: FakeHub) -> None:
    resolve_model("org/name").weights[0].unlink()
    hub.api_refusals["org/name"] = Refusal(403, "GatedRepo")
    message = _error("org/name")
    assert "holds no weights" in message
    assert "Accept its licence" in message


def test_network_lost_during_the_download(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits longer with every attempt
    hub.file_refusals["org/name"] = Refusal(503, message="Service unavailable")
    message = _error("org/name")
    assert "org/name at" in message
    assert "cannot be downloaded" in message
    assert "connect to the network" in message


def test_hub_out_of_order_but_cached(hub: FakeHub) -> None:
    online = resolve_model("org/name")
    hub.api_refusals["org/name"] = Refusal(503)
    assert resolve_model("org/name") == online


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("listed", [True, False])
def test_gated_repository(hub: FakeHub, status: int, listed: bool) -> None:
    """The hub lists the files of most gated repositories and refuses the files themselves."""
    refusals = hub.file_refusals if listed else hub.api_refusals
    refusals["org/name"] = Refusal(status, "GatedRepo", "Access to model org/name is restricted")
    message = _error("org/name")
    assert f"access to org/name at {hub.url} is refused ({status})" in message
    assert "Accept its licence" in message
    assert "hf_token" in message
    assert "hf auth login" in message


def test_bad_token(hub: FakeHub) -> None:
    hub.api_refusals["org/name"] = Refusal(401, message="Invalid credentials in Authorization header")
    message = _error("org/name", token="hf_old")
    assert "refuses the token (401)" in message
    assert "hf_token" in message
    assert "hf_old" not in message


@pytest.mark.parametrize("refusal", [None, Refusal(401, "", "Invalid username or password.")])
def test_repository_that_does_not_exist(hub: FakeHub, refusal: Refusal | None) -> None:
    if refusal is not None:  # what the hub says to whoever is not logged in
        hub.api_refusals["org/nmae"] = refusal
    message = _error("org/nmae")
    assert f"org/nmae at {hub.url} does not exist or is private" in message
    assert "no file or directory 'org/nmae' here either" in message
    assert "check the spelling" in message


def test_revision_that_does_not_exist(hub: FakeHub) -> None:
    message = _error("org/name", revision="v3")
    assert "org/name" in message
    assert "no revision 'v3' (404)" in message
    assert "branch, tag or commit" in message


def test_name_that_the_hub_does_not_allow(hub: FakeHub) -> None:
    message = _error("org/na--me")
    assert "org/na--me" in message
    assert "HFValidationError" in message
    assert hub.tokens == set()


@pytest.mark.parametrize("reference", ["./org/name", "/org/name", "~/name", "a/b/c", "name.gguf", "org name"])
def test_no_network_for_what_cannot_be_a_repository(hub: FakeHub, reference: str) -> None:
    message = _error(reference)
    assert reference in message
    assert "owner/name" in message
    assert hub.tokens == set()
