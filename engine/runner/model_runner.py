"""Runs scheduled steps: sequences in, sampled tokens out, without waiting for one step to launch the next."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from halimede.engine.model_input import KVCache
from halimede.engine.models.base import CausalLM
from halimede.engine.runner.decode_graphs import DecodeGraphs
from halimede.engine.runner.row_table import PromptChunk, RowTable, StepLayout, StepPlan
from halimede.engine.runner.rows import ChooseTokens, Rows
from halimede.engine.runner.sampler import REASONS
from halimede.engine.runner.sampling_metadata import SamplingMetadata, build_sampling_metadata
from halimede.engine.runner.step_queue import Pending, StepQueue
from halimede.scheduler.output import ModelRunnerOutput, SchedulerOutput, TokenLogprobs

# Prompt tokens whose logits exist at once: a long chunk's would take gigabytes (T * V * 4 bytes).
_PROMPT_LOGITS_SLICE = 256

PromptLogprobs = dict[int, tuple[TokenLogprobs, ...]]
Chosen = tuple[list[int], list[TokenLogprobs]]


@dataclass(slots=True)
class _Launched:
    """A step in flight. logits (S, V): once its forward pass has been run.

    prompts, chosen: wait for results; chosen is None for a step that samples nothing, or not yet.
    """

    plan: StepPlan | None
    logits: torch.Tensor | None = None
    prompts: Callable[[], PromptLogprobs] = dict
    chosen: Callable[[], Chosen] | None = None

    @property
    def waits(self) -> bool:
        """Whether it is still to be sampled from."""
        return self.plan is not None and self.chosen is None and len(self.plan.layout.sampled) > 0


class ModelRunner:
    """Keeps what it was told of each sequence and runs the model over the scheduled tokens.

    kv_caches: one per layer; block 0 is the null block, which padding points at. table, rows: what the host
    and the device know of the sequences. graphs: of steps in which every row runs one token.

    What a step's sampling needs to know of tokens that are still being sampled (penalties and bad words do)
    is there once the step before it is collected: then such a step is sampled from, the device being busy
    with its forward pass in the meantime. All other steps are launched whole.
    """

    def __init__(
        self,
        model: CausalLM,
        kv_caches: Sequence[KVCache],
        *,
        table: RowTable,
        rows: Rows,
        queue: StepQueue,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self._model = model
        self._kv_caches = kv_caches
        self._table = table
        self._rows = rows
        self._queue = queue
        self._graphs = graphs
        self._vocab_size = model.config.vocab_size
        self._in_flight: deque[_Launched] = deque()
        self._awaited: set[int] = set()  # sequences whose next token the host needs and a step is sampling

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Launch a step and collect it, with none in flight."""
        self.launch(output)
        return self.collect()

    @torch.inference_mode()
    def launch(self, output: SchedulerOutput) -> None:
        """Forget the sequences that ended, run the scheduled tokens, sample where it is asked for."""
        assert not any(step.waits for step in self._in_flight), "a step behind one without tokens"
        plan = self._table.plan(output)
        launched = _Launched(plan)
        if plan is not None:
            launched.prompts = self._queue.submit(partial(self._forward, launched, plan))
            layout = plan.layout
            late = any(state.seq_id in self._awaited for state in layout.followed)
            if len(layout.sampled) and not late:
                self._sample(launched, plan)
        self._in_flight.append(launched)

    @torch.inference_mode()
    def collect(self) -> ModelRunnerOutput:
        """Wait for the oldest step in flight and say what it produced.

        Prompt log-probabilities of a chunk of the positions a .. b-1 are those of the prompt tokens a+1 .. b.
        """
        launched = self._in_flight.popleft()
        plan = launched.plan
        if plan is None:
            return ModelRunnerOutput({})
        prompts = launched.prompts()
        tokens, entries = ([], []) if launched.chosen is None else launched.chosen()
        self._follow(plan.layout, tokens)
        self._sample_late()
        return _make_output(plan.layout, tokens, entries, prompts)

    def abandon(self) -> None:
        """Wait for what is in flight and drop it; the sequences are to be forgotten."""
        self._queue.drain()
        self._in_flight.clear()
        self._awaited.clear()

    def _forward(self, launched: _Launched, plan: StepPlan) -> Pending[PromptLogprobs]:
        """Work: the step's logits, and the log-probabilities of prompt tokens."""
        size = None if self._graphs is None else self._graphs.size_for(plan)
        if self._graphs is not None and size is not None:
            self._rows.prepare(plan, size)
            launched.logits = self._graphs.replay(size)[: len(plan.layout.sampled)]
            return Pending((), lambda copies: {})
        model_input = self._rows.prepare(plan)
        hidden_states = self._model(model_input, self._kv_caches)
        prompts = self._prompt_logprobs(plan.prompts, hidden_states)
        num_sampled = len(plan.layout.sampled)
        if num_sampled:
            if model_input.outputs is None and len(hidden_states) > num_sampled:
                hidden_states = hidden_states.index_select(0, model_input.logits_indices)
            launched.logits = self._model.compute_logits(hidden_states)
        return prompts

    def _sample(self, launched: _Launched, plan: StepPlan) -> None:
        """Launch the sampling of a step whose forward pass is launched."""
        metadata = build_sampling_metadata(plan, vocab_size=self._vocab_size)
        choose = self._rows.choose_with(plan)
        launched.chosen = self._queue.submit(partial(self._choose, launched, metadata, choose))
        self._awaited.update(state.seq_id for state in plan.layout.followed)

    def _choose(
        self, launched: _Launched, metadata: SamplingMetadata, choose: ChooseTokens
    ) -> Pending[Chosen]:
        """Work: the tokens of a step."""
        assert launched.logits is not None, "a step is sampled from after its forward pass"
        sample = choose(launched.logits, metadata)
        launched.logits = None

        def read(copies: Sequence[torch.Tensor]) -> Chosen:
            tokens: list[int] = copies[0].tolist()
            return tokens, sample.entries(tokens, copies[1:])

        return Pending((sample.tokens, *sample.tensors), read)

    def _sample_late(self) -> None:
        """Sample the oldest step in flight, if that had to wait for tokens which are known now."""
        launched = self._in_flight[0] if self._in_flight else None
        if launched is not None and launched.waits and launched.plan is not None:
            self._sample(launched, launched.plan)

    def _follow(self, layout: StepLayout, tokens: Sequence[int]) -> None:
        """Tell the sequences of a step whose sampling hangs on it what their tokens were."""
        if not layout.followed:
            return
        for state, token in zip(layout.states, tokens, strict=True):
            if state.follows_tokens and token >= 0:
                state.append_token(token)
            self._awaited.discard(state.seq_id)

    def _prompt_logprobs(
        self, chunks: Sequence[PromptChunk], hidden_states: torch.Tensor
    ) -> Pending[PromptLogprobs]:
        """Of each chunk; hidden_states (T, hidden)."""
        parts: list[tuple[int, Pending[list[TokenLogprobs]]]] = []
        for seq_id, first, token_ids, num_logprobs in chunks:
            for at in range(0, len(token_ids), _PROMPT_LOGITS_SLICE):
                piece = token_ids[at : at + _PROMPT_LOGITS_SLICE]
                logits = self._model.compute_logits(hidden_states[first + at : first + at + len(piece)])
                counts = [num_logprobs] * len(piece)
                parts.append((seq_id, self._rows.prompt_logprobs(logits, piece, counts)))

        def read(copies: Sequence[torch.Tensor]) -> PromptLogprobs:
            found: PromptLogprobs = {}
            at = 0
            for seq_id, part in parts:
                own = copies[at : at + len(part.tensors)]
                at += len(part.tensors)
                found[seq_id] = found.get(seq_id, ()) + tuple(part.read(own))
            return found

        return Pending(tuple(tensor for _, part in parts for tensor in part.tensors), read)


def _make_output(
    layout: StepLayout,
    tokens: Sequence[int],
    entries: Sequence[TokenLogprobs],
    prompts: PromptLogprobs,
) -> ModelRunnerOutput:
    seq_ids = layout.sampled_seq_ids if tokens else ()
    sampled: dict[int, tuple[int, ...]] = dict(zip(seq_ids, zip(tokens, strict=True), strict=True))
    errors: dict[int, str] = {}
    if tokens and min(tokens) < 0:
        errors = {seq_id: REASONS[new[0]] for seq_id, new in sampled.items() if new[0] < 0}
        sampled = {seq_id: new for seq_id, new in sampled.items() if seq_id not in errors}
    logprobs: PromptLogprobs = {}
    if entries:
        wanted = [seq_ids[row] for row in layout.reporting]
        logprobs = {
            seq_id: (entry,) for seq_id, entry in zip(wanted, entries, strict=True) if seq_id not in errors
        }
    return ModelRunnerOutput(sampled, logprobs, prompts, errors)
