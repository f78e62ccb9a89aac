"""Runs a scheduled step: sequences in, sampled tokens out."""

from collections.abc import Iterator, Sequence

import torch

from halimede.engine.model_input import KVCache, ModelInput
from halimede.engine.models.base import CausalLM
from halimede.engine.runner.build_input import build_model_input
from halimede.engine.runner.sampler import Sampler
from halimede.engine.runner.sampling_metadata import build_sampling_metadata
from halimede.engine.runner.sequence_state import SequenceState
from halimede.scheduler.output import ModelRunnerOutput, ScheduledSequence, SchedulerOutput, TokenLogprobs

# Prompt tokens whose logits exist at once: a long chunk's would take gigabytes (T * V * 4 bytes).
_PROMPT_LOGITS_SLICE = 256


class ModelRunner:
    """Keeps what it was told of each sequence and runs the model over the scheduled tokens.

    kv_caches: one per layer; block 0 is the null block, which padding points at.
    """

    def __init__(
        self,
        model: CausalLM,
        kv_caches: Sequence[KVCache],
        *,
        block_size: int,
        device: torch.device,
        sampler: Sampler,
    ) -> None:
        self._model = model
        self._kv_caches = kv_caches
        self._block_size = block_size
        self._device = device
        self._sampler = sampler
        self._vocab_size = model.config.vocab_size
        self._states: dict[int, SequenceState] = {}

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Forget the sequences that ended, run the scheduled tokens, sample where it is asked for.

        Prompt log-probabilities of a chunk of the positions a .. b-1 are those of the prompt tokens a+1 .. b.
        """
        for seq_id in (*output.finished_seq_ids, *output.preempted_seq_ids):
            self._states.pop(seq_id, None)
        if not output.scheduled:
            return ModelRunnerOutput({})
        states = [self._update_state(scheduled) for scheduled in output.scheduled]
        model_input = build_model_input(
            output.scheduled,
            states,
            block_size=self._block_size,
            device=self._device,
            all_hidden_states=any(s.request.sampling_params.prompt_logprobs is not None for s in states),
        )
        hidden_states = self._model(model_input, self._kv_caches)
        prompt_logprobs = dict(self._prompt_logprobs(output.scheduled, states, hidden_states))
        sampling = [
            (scheduled.seq_id, state)
            for scheduled, state in zip(output.scheduled, states, strict=True)
            if scheduled.needs_sample
        ]
        return self._sample(sampling, model_input, hidden_states, prompt_logprobs)

    def _update_state(self, scheduled: ScheduledSequence) -> SequenceState:
        if scheduled.new is not None:
            self._states[scheduled.seq_id] = SequenceState(scheduled.new, vocab_size=self._vocab_size)
        state = self._states[scheduled.seq_id]
        state.append_blocks(scheduled.new_block_ids)
        return state

    def _sample(
        self,
        sampling: Sequence[tuple[int, SequenceState]],
        model_input: ModelInput,
        hidden_states: torch.Tensor,
        prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]],
    ) -> ModelRunnerOutput:
        if not sampling:
            return ModelRunnerOutput({}, prompt_logprobs=prompt_logprobs)
        if model_input.outputs is None:
            hidden_states = hidden_states.index_select(0, model_input.logits_indices)
        logits = self._model.compute_logits(hidden_states)
        metadata = build_sampling_metadata([state for _, state in sampling], vocab_size=self._vocab_size)
        sampled = self._sampler.sample(logits, metadata)
        for row, token_id in sampled.token_ids.items():
            sampling[row][1].append_token(token_id)
        return ModelRunnerOutput(
            sampled_token_ids={sampling[row][0]: (token,) for row, token in sampled.token_ids.items()},
            logprobs={sampling[row][0]: (entry,) for row, entry in sampled.logprobs.items()},
            prompt_logprobs=prompt_logprobs,
            errors={sampling[row][0]: reason for row, reason in sampled.errors.items()},
        )

    def _prompt_logprobs(
        self,
        scheduled: Sequence[ScheduledSequence],
        states: Sequence[SequenceState],
        hidden_states: torch.Tensor,
    ) -> Iterator[tuple[int, tuple[TokenLogprobs, ...]]]:
        """(seq_id, entries) of each sequence that asked and whose chunk predicts prompt tokens."""
        end = 0
        for chunk, state in zip(scheduled, states, strict=True):
            start, end = end, end + len(chunk.token_ids)
            num_logprobs = state.request.sampling_params.prompt_logprobs
            first = chunk.num_computed_tokens + 1
            targets = state.token_ids[first : min(first + end - start, state.num_prompt_tokens)]
            if num_logprobs is None or not targets:
                continue
            entries: list[TokenLogprobs] = []
            for at in range(0, len(targets), _PROMPT_LOGITS_SLICE):
                piece = targets[at : at + _PROMPT_LOGITS_SLICE]
                logits = self._model.compute_logits(hidden_states[start + at : start + at + len(piece)])
                entries += self._sampler.token_logprobs(logits, piece, [num_logprobs] * len(piece))
            yield chunk.seq_id, tuple(entries)
