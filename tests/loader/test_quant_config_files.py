"""Quantization settings in a file of their own, and such that contradict config.json."""

import json
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub
from test_resolve_hub import hub as hub

from halimede.engine.loader.quant_config_files import QUANT_CONFIG_FILES, add_quant_config
from halimede.engine.loader.resolve import resolve_model
from halimede.errors import ModelLoadError

CONFIG = {"architectures": ["LlamaForCausalLM"]}
MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["a"]}}
GPTQ = {"bits": 4, "group_size": 128, "desc_act": True, "sym": True}
AWQ = {"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}


def add(folder: Path, config: dict[str, Any], **files: Any) -> dict[str, Any]:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return add_quant_config(folder, config)


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("hf_quant_config", MODELOPT, {"quant_method": "modelopt", **MODELOPT["quantization"]}),
        ("quantize_config", GPTQ, {"quant_method": "gptq", **GPTQ}),
        ("quant_config", AWQ, {"quant_method": "awq", **AWQ}),
        ("quantize_config", GPTQ | {"quant_method": "awq"}, GPTQ | {"quant_method": "awq"}),
    ],
)
def test_a_file_stands_in_for_the_section(
    tmp_path: Path, file: str, content: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert add(tmp_path, CONFIG, **{file: content}) == CONFIG | {"quantization_config": expected}
    assert "quantization_config" not in CONFIG


def test_nothing_is_added_without_a_file_or_for_the_cache_alone(tmp_path: Path) -> None:
    assert add(tmp_path, CONFIG) == CONFIG
    cache = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    assert add(tmp_path, CONFIG, hf_quant_config=cache) == CONFIG


@pytest.mark.parametrize(
    ("section", "files"),
    [
        ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["b"]}, {"hf_quant_config": MODELOPT}),
        ({"quant_method": "modelopt", **MODELOPT}, {"hf_quant_config": MODELOPT}),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, {"quant_config": AWQ}),
        ({"quant_method": "awq_marlin", "bits": 4}, {"quant_config": AWQ}),
        ({"quant_method": "gptq", **GPTQ}, {"quantize_config": GPTQ}),
    ],
)
def test_what_config_json_says_stays_where_a_file_agrees(
    tmp_path: Path, section: dict[str, Any], files: dict[str, Any]
) -> None:
    config = CONFIG | {"quantization_config": section}
    assert add(tmp_path, config, **files) == config


@pytest.mark.parametrize(
    ("config", "files", "first", "second"),
    [
        (
            {"quantization_config": {"quant_method": "fp8"}},
            {"hf_quant_config": MODELOPT},
            "config.json says quant_method='fp8'",
            "hf_quant_config.json says quant_method='modelopt'",
        ),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
            {"hf_quant_config": MODELOPT},
            "config.json says quant_algo='NVFP4'",
            "hf_quant_config.json says quant_algo='FP8'",
        ),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 8}},
            {"quant_config": AWQ},
            "config.json says bits=8",
            "quant_config.json says bits=4",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": -1}},
            {"quantize_config": GPTQ},
            "config.json says group_size=-1",
            "quantize_config.json says group_size=128",
        ),
        (
            {"compression_config": {"format": "pack-quantized"}},
            {"quantize_config": GPTQ},
            "config.json says quant_method='compressed-tensors'",
            "quantize_config.json says quant_method='gptq'",
        ),
        (
            {},
            {"quantize_config": GPTQ, "quant_config": AWQ},
            "quantize_config.json says quant_method='gptq'",
            "quant_config.json says quant_method='awq'",
        ),
    ],
)
def test_contradictions_name_both_files_and_values(
    tmp_path: Path, config: dict[str, Any], files: dict[str, Any], first: str, second: str
) -> None:
    with pytest.raises(ModelLoadError) as caught:
        add(tmp_path, config, **files)
    assert f"{tmp_path}/{first}, but {tmp_path}/{second}: remove" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not valid JSON"), ("[]", "holds a list"), ('{"quantization": 3}', "quantization=3 must be")],
)
def test_files_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "hf_quant_config.json").write_text(text)
    with pytest.raises(ModelLoadError, match=rf"hf_quant_config\.json.* ?{message}"):
        add_quant_config(tmp_path, CONFIG)


def test_a_directory_is_read_with_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "quant_config.json").write_text(json.dumps(AWQ))
    assert resolve_model(str(tmp_path)).config["quantization_config"] == {"quant_method": "awq", **AWQ}


def test_a_download_fetches_them(hub: FakeHub) -> None:
    hub.repositories["org/name"]["hf_quant_config.json"] = json.dumps(MODELOPT).encode()
    files = resolve_model("org/name")
    assert "hf_quant_config.json" in hub.downloaded
    assert files.config["quantization_config"]["quant_method"] == "modelopt"
    assert set(QUANT_CONFIG_FILES) == {"hf_quant_config.json", "quantize_config.json", "quant_config.json"}
