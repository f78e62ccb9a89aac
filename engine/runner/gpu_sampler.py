"""The sampler on a GPU: Triton kernels, nothing sorted, and no wait for the GPU before the tokens are read.

What the kernels must know of the rows is put together on the host and goes over in one copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from halimede.engine.runner.logprobs import logprob_entries, token_logprobs
from halimede.engine.runner.sampler import Sample
from halimede.engine.runner.sampling_metadata import Penalties, SamplingMetadata
from halimede.engine.runner.step_queue import Pending
from halimede.engine.runner.upload import upload
from halimede.kernels.gpu.logprobs import LARGEST_COUNT, packed_logprobs, unpack_logprobs
from halimede.kernels.gpu.sampling_adjust import PenaltyLists, adjust_logits
from halimede.kernels.gpu.sampling_draw import draw_tokens, make_draw_workspace
from halimede.kernels.gpu.sampling_threshold import sampling_threshold
from halimede.scheduler.output import TokenLogprobs

_Array = npt.NDArray[Any]
_Arrays = dict[str, _Array]


@dataclass(frozen=True, slots=True)
class _Inputs:
    """The metadata as tensors on the device, by name; a feature that no row uses has none of its names."""

    tensors: dict[str, torch.Tensor]

    def get(self, *names: str) -> tuple[torch.Tensor, ...] | None:
        """The tensors of those names, None if they are not there."""
        return tuple(self.tensors[name] for name in names) if names[0] in self.tensors else None


_NOTHING = _Inputs({})


class RandomTensors(NamedTuple):
    """What rows that draw need, of all S rows of a step, on the device; a greedy row has temperature 0.

    temperature, min_p, top_p (S) float32; top_k (S) int32; keys (S, 2) int64: see RandomRows.
    """

    temperature: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    keys: torch.Tensor


class TritonSampler:
    """Triton kernels, for one stream of a device; on a CPU they are interpreted.

    It takes logits in the model's dtype and metadata whose tensors are on the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._workspace = make_draw_workspace(0, device)

    def launch(
        self, logits: torch.Tensor, metadata: SamplingMetadata, random: RandomTensors | None
    ) -> Sample:
        """As TorchSampler.launch. The logits are left as they were where log-probabilities are asked for."""
        wanted, counts = metadata.wanted, metadata.num_logprobs
        inputs = self._upload(metadata, len(logits))
        raw = logits
        if metadata.adjusts_logits:
            # float() copies what is not float32; log-probabilities need the logits as they were.
            logits = logits.clone() if wanted and logits.dtype == torch.float32 else logits.float()
        filters = random if metadata.filters else None
        tokens = self._choose(logits, inputs, random, filters)
        packed = self._packed_logprobs(raw, tokens, counts, inputs.tensors.get("wanted"))
        if packed is not None:
            return Sample(
                tokens,
                (packed,),
                lambda chosen, copies: _entries(copies[0], [max(chosen[row], 0) for row in wanted], counts),
            )
        entries: list[TokenLogprobs] = []
        if wanted:  # more than the kernel finds: this waits for the device
            rows = list(wanted)
            entries = token_logprobs(raw[rows].float(), tokens[rows].clamp(min=0), counts)
        return Sample(tokens, (), lambda chosen, copies: entries)

    def launch_logprobs(
        self, logits: torch.Tensor, token_ids: Sequence[int], num_logprobs: Sequence[int]
    ) -> Pending[list[TokenLogprobs]]:
        """The log-probabilities of every row of logits (P, V), its token's and of the most probable ones."""
        tokens = upload({"tokens": np.array(token_ids, dtype=np.int64)}, self._device)["tokens"]
        packed = self._packed_logprobs(logits, tokens, num_logprobs, None)
        if packed is None:
            entries = token_logprobs(logits.float(), tokens, num_logprobs)
            return Pending((), lambda copies: entries)
        return Pending((packed,), lambda copies: _entries(copies[0], token_ids, num_logprobs))

    def _choose(
        self,
        logits: torch.Tensor,
        inputs: _Inputs,
        random: RandomTensors | None,
        filters: RandomTensors | None,
    ) -> torch.Tensor:
        """The chosen tokens (S) int64 on the device; a negative one is the code of the row's error."""
        penalties = inputs.get(
            "penalty_rows", "penalty_tokens", "counts", "repetition", "frequency", "presence"
        )
        bias, masks = inputs.get("bias_rows", "bias_tokens", "bias"), inputs.get("mask_rows", "bitmask")
        banned = inputs.get("banned_rows", "banned_tokens")
        flags = None
        if bias or penalties or masks or banned:
            flags = adjust_logits(
                logits,
                bias=bias,
                penalties=None if penalties is None else PenaltyLists(*penalties),
                masks=masks,
                banned=banned,
            )
        if self._workspace.best.shape[0] < logits.shape[0]:
            self._workspace = make_draw_workspace(2 * logits.shape[0], self._device)
        return draw_tokens(
            logits,
            self._workspace,
            temperature=None if random is None else random.temperature,
            keys=None if random is None else random.keys,
            threshold=None if filters is None else sampling_threshold(logits, *filters[:4]),
            flags=flags,
        )

    def _packed_logprobs(
        self,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        counts: Sequence[int],
        rows: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """What packed_logprobs returns; None if nobody asks, or for more than it can."""
        if not counts:
            return None
        vocab_size = logits.shape[-1]
        most = max((vocab_size if n == -1 else min(n, vocab_size) for n in counts), default=LARGEST_COUNT + 1)
        return packed_logprobs(logits, tokens, most, rows) if most <= LARGEST_COUNT else None

    def _upload(self, metadata: SamplingMetadata, rows: int) -> _Inputs:
        if not metadata.adjusts_logits and len(metadata.wanted) in (0, rows):
            return _NOTHING
        arrays: _Arrays = {}
        if metadata.penalties is not None:
            arrays |= _penalty_arrays(metadata.penalties, rows)
        if metadata.bias is not None:
            arrays["bias_rows"], arrays["bias_tokens"] = (_int32(t) for t in metadata.bias[:2])
            arrays["bias"] = metadata.bias[2].numpy()
        if metadata.banned is not None:
            arrays["banned_rows"], arrays["banned_tokens"] = (_int32(t) for t in metadata.banned)
        if metadata.forbidden:
            arrays["mask_rows"] = np.array([row for row, _ in metadata.forbidden], dtype=np.int32)
            arrays["bitmask"] = _bitmask([mask for _, mask in metadata.forbidden])
        if 0 < len(metadata.wanted) < rows:
            arrays["wanted"] = np.array(metadata.wanted, dtype=np.int32)
        return _Inputs(upload(arrays, self._device))


def _int32(tensor: torch.Tensor) -> _Array:
    return tensor.numpy().astype(np.int32)


def _penalty_arrays(penalties: Penalties, rows: int) -> _Arrays:
    def per_row(values: torch.Tensor, default: float) -> _Array:
        result = np.full(rows, default, dtype=np.float32)
        result[penalties.rows.numpy()] = values.numpy()
        return result

    return {
        "penalty_rows": _int32(penalties.rows),
        "penalty_tokens": _int32(penalties.token_ids),
        "counts": _int32(penalties.output_counts),
        "repetition": per_row(penalties.repetition, 1.0),
        "frequency": per_row(penalties.frequency, 0.0),
        "presence": per_row(penalties.presence, 0.0),
    }


def _bitmask(forbidden: Sequence[torch.Tensor]) -> _Array:
    """(M, ceil(V / 32)) int32 with a bit for each allowed token."""
    allowed = np.packbits(~np.stack([mask.numpy() for mask in forbidden]), axis=1, bitorder="little")
    words: _Array = np.pad(allowed, ((0, 0), (0, -allowed.shape[1] % 4))).view(np.int32)
    return words


def _entries(
    packed: torch.Tensor, token_ids: Sequence[int], num_logprobs: Sequence[int]
) -> list[TokenLogprobs]:
    """The TokenLogprobs of packed logprobs, on the CPU."""
    columns = [column.tolist() for column in unpack_logprobs(packed)]
    return logprob_entries(token_ids, *columns, num_logprobs=num_logprobs)
