import dataclasses

import pytest
import torch

from halimede import ConfigError, EngineConfig
from halimede.engine.vllm_options import drop_vllm_options


def test_unknown_keyword_names_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"max_model_length.*did you mean 'max_model_len'"):
        EngineConfig(model="m", max_model_length=5)  # type: ignore[call-arg]


def test_every_field_has_help() -> None:
    assert all(f.metadata["help"].endswith(".") for f in dataclasses.fields(EngineConfig))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float8"}, ["dtype", "float8", "bfloat16"]),
        ({"block_size": 20}, ["block_size", "20", "16"]),
        ({"scheduling_policy": "lifo"}, ["scheduling_policy", "lifo", "priority"]),
        ({"max_num_seqs": 0}, ["max_num_seqs", "0", "at least 1"]),
        ({"max_model_len": -1}, ["max_model_len", "-1"]),
        ({"max_model_len": True}, ["max_model_len", "True"]),
        ({"kv_cache_memory_bytes": 0}, ["kv_cache_memory_bytes", "0"]),
        ({"gpu_memory_utilization": 1.5}, ["gpu_memory_utilization", "1.5"]),
        ({"max_logprobs": -2}, ["max_logprobs", "-2"]),
        ({"model": ""}, ["model", "empty"]),
        ({"gpu_memory_utilization": "0.9"}, ["gpu_memory_utilization", "'0.9'", "float"]),
        ({"enable_prefix_caching": "False"}, ["enable_prefix_caching", "bool"]),
        ({"seed": None}, ["seed", "int"]),
        ({"tensor_parallel_size": 2}, ["tensor_parallel_size", "2", "use 1"]),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, ["64", "32", "lower"]),
        ({"load_format": "npcache"}, ["load_format", "npcache", "safetensors", "dummy"]),
        ({"hf_overrides": 5}, ["hf_overrides", "5", "dict", "Callable"]),
        ({"hf_overrides": [1]}, ["hf_overrides", "[1]"]),
        ({"hf_overrides": True}, ["hf_overrides", "True"]),
        ({"skip_tokenizer_init": True, "tokenizer": "t"}, ["tokenizer", "skip_tokenizer_init"]),
    ],
)
def test_bad_values_say_the_fact_the_value_and_the_remedy(options: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**{"model": "m", **options})
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("given", "dtype"), [("half", "float16"), ("float", "float32"), (torch.bfloat16, "bfloat16")]
)
def test_dtypes_as_vllms_scripts_spell_them(given: object, dtype: str) -> None:
    assert EngineConfig(model="m", dtype=given).dtype == dtype  # type: ignore[arg-type]


def test_vllms_options_that_mean_nothing_here(caplog: pytest.LogCaptureFixture) -> None:
    given = {
        "swap_space": 4,
        "pipeline_parallel_size": 1,
        "enable_prefix_caching": None,
    }
    assert drop_vllm_options({**given, "seed": 3}) == {"seed": 3}
    assert "swap_space" in caplog.text
    with pytest.raises(ConfigError, match="pipeline_parallel_size=2"):
        drop_vllm_options({"pipeline_parallel_size": 2})


def test_no_option_that_exists_here_is_taken_for_one_that_does_not() -> None:
    given = {name: object() for name in EngineConfig.__dataclass_fields__}
    assert drop_vllm_options(given).keys() == given.keys()
