"""The checkpoints that other tests rely on: every form holds the same model, and the tokenizer works."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    BOS_TOKEN_ID,
    CORPUS,
    EOS_TOKEN_ID,
    VOCAB_SIZE,
    reference_logits,
    write_tiny_checkpoint,
)

TOKENS = [1, 9, 300, 44, 511]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return reference_logits(write_tiny_checkpoint(tmp_path_factory.mktemp("plain")), TOKENS)


@pytest.mark.parametrize("form", [{"shards": 3}, {"format": "bin"}, {"format": "bin", "shards": 2}])
def test_transformers_reads_every_form_as_the_same_model(
    tmp_path: Path, plain: torch.Tensor, form: dict[str, Any]
) -> None:
    path = write_tiny_checkpoint(tmp_path, **form)
    assert torch.equal(reference_logits(path, TOKENS), plain)
    assert len([file for file in path.iterdir() if file.suffix in (".bin", ".safetensors")]) == form.get(
        "shards", 1
    )


def test_the_seed_decides_the_weights(tmp_path: Path, plain: torch.Tensor) -> None:
    assert not torch.allclose(reference_logits(write_tiny_checkpoint(tmp_path, seed=1), TOKENS), plain)


def test_the_tokenizer_round_trips_and_has_a_chat_template(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_tiny_checkpoint(tmp_path, tokenizer=True))
    assert len(tokenizer) == VOCAB_SIZE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS_TOKEN_ID, EOS_TOKEN_ID)
    for text in CORPUS:
        ids = tokenizer(text).input_ids
        assert ids[0] == BOS_TOKEN_ID
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|user|>\nHello</s>\n<|assistant|>\n"
