"""load_format and hf_overrides through the whole engine."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_tiny_checkpoint

from halimede import LLM, ModelLoadError, SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def generate(path: Path, **settings: Any) -> list[int]:
    with LLM(
        str(path), dtype="float32", skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 22, **settings
    ) as llm:
        (output,) = llm.generate([{"prompt_token_ids": [5, 6, 7]}], PARAMS, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def test_dummy_weights_need_only_a_config(tmp_path: Path) -> None:
    whole = write_tiny_checkpoint(tmp_path / "whole")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(whole / "config.json", bare)
    tokens = generate(bare, load_format="dummy")
    assert len(set(tokens)) > 3
    assert generate(bare, load_format="dummy") == tokens == generate(whole, load_format="dummy")
    assert generate(whole) != tokens
    with pytest.raises(ModelLoadError, match="holds no weights"):
        generate(bare)


def test_overrides_change_the_model(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    changed = tmp_path / "changed"
    shutil.copytree(path, changed)
    config["rope_parameters"]["rope_theta"] = 20.0
    (changed / "config.json").write_text(json.dumps(config))
    expected = generate(changed)
    assert expected != generate(path) == generate(path, hf_overrides={})
    assert generate(path, hf_overrides={"rope_parameters": {"rope_theta": 20.0}}) == expected

    def override(config: Any) -> Any:
        config.rope_parameters.rope_theta = 20.0
        return config

    assert generate(path, hf_overrides=override) == expected
    with pytest.raises(ModelLoadError, match=r"config.json with hf_overrides: vocab_size=-1"):
        generate(path, hf_overrides={"vocab_size": -1})


def test_overrides_of_a_gguf(smollm2_gguf: Path) -> None:
    from halimede import EngineConfig
    from halimede.engine.build import open_model

    overrides = {"max_position_embeddings": 4096, "rope_parameters": {"rope_theta": 7.0}}
    files, config = open_model(EngineConfig(model=str(smollm2_gguf), hf_overrides=overrides))
    assert (config.max_position_embeddings, config.rope.rope_theta) == (4096, 7.0)
    assert files.format == "gguf"
