"""The prompts of the benchmarks as token ids, the same for every engine."""

from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

from prompts import CHATS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCHES = (1, 8, 32)
PREFILL_TOKENS = 1024
NEW_TOKENS = 64


@dataclass(frozen=True)
class Workload:
    """prompts: chats, of which a batch takes the first. prefill: a long prompt. new_tokens: per prompt."""

    prompts: list[list[int]]
    prefill: list[int]
    batches: tuple[int, ...]
    new_tokens: int

    def describe(self) -> dict[str, object]:
        """The sizes, for the report."""
        lengths = [len(prompt) for prompt in self.prompts]
        return {
            "prompt_tokens": lengths,
            "prompt_tokens_of_batch": {str(size): sum(lengths[:size]) for size in self.batches},
            "prefill_tokens": len(self.prefill),
            "new_tokens": self.new_tokens,
        }


def open_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint directory."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    return tokenizer


def render_chats(tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """CHATS through the chat template, up to the point where the assistant speaks."""
    texts = (
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in CHATS
    )
    return [list(tokenizer.encode(text, add_special_tokens=False)) for text in texts]


def running_text(tokenizer: "PreTrainedTokenizerBase", num_tokens: int, start: int = 0) -> list[int]:
    """num_tokens tokens of English: the chats' messages one after the other, from token `start` on."""
    messages = "\n\n".join(message["content"] for chat in CHATS for message in chat)
    ids = tokenizer.encode(messages, add_special_tokens=False)
    return list(islice(cycle(ids), start % len(ids), start % len(ids) + num_tokens))


def build(directory: Path, *, quick: bool = False) -> Workload:
    """The workload for the model in `directory`; quick=True is the same in small, to try things out."""
    tokenizer = open_tokenizer(directory)
    chats = render_chats(tokenizer)
    if quick:
        short = sorted(chats, key=len)[:4]
        return Workload(short, running_text(tokenizer, 64), (1, 2, 4), 4)
    return Workload(chats, running_text(tokenizer, PREFILL_TOKENS), BATCHES, NEW_TOKENS)
