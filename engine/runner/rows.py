"""Where the state of running sequences lies that a step reads: the seam between the runner and its device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from halimede.engine.model_input import ModelInput
from halimede.engine.runner.row_table import StepPlan
from halimede.engine.runner.sampler import Sample
from halimede.engine.runner.sampling_metadata import SamplingMetadata
from halimede.engine.runner.step_queue import Pending
from halimede.scheduler.output import TokenLogprobs

ChooseTokens = Callable[[torch.Tensor, SamplingMetadata], Sample]


@dataclass(frozen=True, slots=True)
class RowLimits:
    """The largest step: sequences, tokens in all, tokens of a sequence; tokens of a block."""

    max_rows: int
    max_tokens: int
    max_model_len: int
    block_size: int

    @property
    def max_blocks(self) -> int:
        """Blocks of a sequence."""
        return -(-self.max_model_len // self.block_size)


class Rows(Protocol):
    """Block tables, last tokens and sampling parameters of the sequences that have slots.

    What it is asked to do it does in the order of the steps, as work for a StepQueue, but for choose_with.
    """

    def prepare(self, plan: StepPlan, padded_rows: int | None = None) -> ModelInput:
        """Apply what changes and say what the model reads.

        padded_rows: for a step of one token a row, sampled from in every row: as if it had so many rows, the
        rest of which stand for nothing. What it reads is then in the same place for every such step.
        """
        ...

    def choose_with(self, plan: StepPlan) -> ChooseTokens:
        """Called by the host, before what the plan's rows hold is changed: how the tokens of a step are
        chosen from its logits (S, V), and kept as the rows' last ones, as work for the queue."""
        ...

    def prompt_logprobs(
        self, logits: torch.Tensor, token_ids: Sequence[int], num_logprobs: Sequence[int]
    ) -> Pending[list[TokenLogprobs]]:
        """The log-probabilities at each row of logits (P, V): see logprobs.token_logprobs."""
        ...
