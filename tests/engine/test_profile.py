"""Traces of torch's profiler."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import write_tiny_checkpoint

from halimede import LLM, ConfigError, SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=2)
PROMPT = {"prompt_token_ids": [5, 6, 7]}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("tiny")
    path = write_tiny_checkpoint(folder / "model")
    with LLM(
        str(path),
        profile=folder / "traces",
        skip_tokenizer_init=True,
        device="cpu",
        num_gpu_blocks_override=8,
    ) as llm:
        yield llm


def names_in(path: Path) -> set[str]:
    return {event.get("name", "") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}


def traces(llm: LLM) -> list[Path]:
    assert llm.config.profile is not None
    return sorted(Path(llm.config.profile).glob("*.json.gz"))


def test_each_run_has_a_trace(llm: LLM) -> None:
    llm.generate(PROMPT, PARAMS, use_tqdm=False)
    (first,) = traces(llm)
    assert any("linear" in name or "mm" in name for name in names_in(first))
    list(llm.stream(PROMPT, PARAMS))
    assert len(traces(llm)) == 2


def test_one_of_what_the_caller_likes(llm: LLM, tmp_path: Path) -> None:
    before = len(traces(llm))
    llm.start_profile(str(tmp_path / "mine"))
    with pytest.raises(ConfigError, match="a profile is being recorded"):
        llm.start_profile()
    for _ in range(2):
        llm.generate(PROMPT, PARAMS, use_tqdm=False)
    path = Path(llm.stop_profile())
    assert path.parent == tmp_path / "mine"
    assert names_in(path)
    assert len(traces(llm)) == before
    with pytest.raises(ConfigError, match="call start_profile first"):
        llm.stop_profile()
    llm.generate(PROMPT, PARAMS, use_tqdm=False)
    assert len(traces(llm)) == before + 1


def test_a_folder_that_cannot_be_written_to(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="give a folder that can be written to"):
        llm.start_profile(str(tmp_path / "file" / "x"))
