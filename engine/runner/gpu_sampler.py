"""The sampler on a GPU: Triton kernels, nothing sorted, and no wait for the GPU before the tokens are read.

What the kernels must know of the rows is put together on the host and goes over in one copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from halimede.engine.runner.logprobs import logprob_entries, token_logprobs
from halimede.engine.runner.sampler import SamplerOutput, sampler_output
from halimede.engine.runner.sampling_metadata import Penalties, RandomRows, SamplingMetadata
from halimede.kernels.gpu.logprobs import LARGEST_COUNT, packed_logprobs, unpack_logprobs
from halimede.kernels.gpu.sampling_adjust import PenaltyLists, adjust_logits
from halimede.kernels.gpu.sampling_draw import draw_tokens, make_draw_workspace
from halimede.kernels.gpu.sampling_threshold import sampling_threshold
from halimede.scheduler.output import TokenLogprobs

_Array = npt.NDArray[Any]
_Arrays = dict[str, _Array]
_ALIGNMENT = 16
_SIGNED_64 = 1 << 63


@dataclass(frozen=True, slots=True)
class _Inputs:
    """The metadata as tensors on the device, by name; a feature that no row uses has none of its names."""

    tensors: dict[str, torch.Tensor]

    def get(self, *names: str) -> tuple[torch.Tensor, ...] | None:
        """The tensors of those names, None if they are not there."""
        return tuple(self.tensors[name] for name in names) if names[0] in self.tensors else None


class TritonSampler:
    """A Sampler of Triton kernels, for one stream of a device; on a CPU they are interpreted.

    It takes logits in the model's dtype and metadata whose tensors are on the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._workspace = make_draw_workspace(0, device)

    def sample(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """See Sampler.sample."""
        wanted = [row for row, n in enumerate(metadata.num_logprobs) if n is not None]
        counts = [n for n in metadata.num_logprobs if n is not None]
        tokens, packed = self.launch(logits, metadata)
        chosen: list[int] = tokens.tolist()
        entries: list[TokenLogprobs] = []
        if packed is not None:
            entries = _entries(packed, [max(chosen[row], 0) for row in wanted], counts)
        elif wanted:
            entries = token_logprobs(logits[wanted].float(), tokens[wanted].clamp(min=0), counts)
        return sampler_output(chosen, wanted, entries)

    def launch(
        self, logits: torch.Tensor, metadata: SamplingMetadata
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What runs on the device: the tokens (S) int64, negative ones codes of errors, and the packed
        log-probabilities of the rows that ask, None if none does or they ask for too many.

        The logits are left as they were where log-probabilities are asked for.
        """
        wanted = [row for row, n in enumerate(metadata.num_logprobs) if n is not None]
        inputs = self._upload(metadata, wanted, *logits.shape)
        raw = logits
        if metadata.adjusts_logits:
            # float() copies what is not float32; log-probabilities need the logits as they were.
            logits = logits.clone() if wanted and logits.dtype == torch.float32 else logits.float()
        tokens = self._choose(logits, inputs)
        counts = [n for n in metadata.num_logprobs if n is not None]
        return tokens, self._packed_logprobs(raw, tokens, counts, inputs.tensors.get("wanted"))

    def launch_logprobs(
        self, logits: torch.Tensor, tokens: torch.Tensor, num_logprobs: Sequence[int]
    ) -> torch.Tensor | None:
        """The packed log-probabilities of every row of logits (P, V) beside tokens (P) int64."""
        return self._packed_logprobs(logits, tokens, num_logprobs, None)

    def token_logprobs(
        self, logits: torch.Tensor, token_ids: Sequence[int], num_logprobs: Sequence[int]
    ) -> list[TokenLogprobs]:
        """See Sampler.token_logprobs."""
        tokens = _upload_arrays({"tokens": np.array(token_ids, dtype=np.int64)}, self._device)["tokens"]
        packed = self.launch_logprobs(logits, tokens, num_logprobs)
        if packed is None:
            return token_logprobs(logits.float(), tokens, num_logprobs)
        return _entries(packed, token_ids, num_logprobs)

    def _choose(self, logits: torch.Tensor, inputs: _Inputs) -> torch.Tensor:
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
        if len(self._workspace.best) < len(logits):
            self._workspace = make_draw_workspace(2 * len(logits), self._device)
        filters = inputs.get("temperature", "min_p", "top_k", "top_p") if "top_k" in inputs.tensors else None
        return draw_tokens(
            logits,
            self._workspace,
            temperature=inputs.tensors.get("temperature"),
            keys=inputs.tensors.get("keys"),
            threshold=None if filters is None else sampling_threshold(logits, *filters),
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
        vocab_size = logits.shape[-1]
        most = max((vocab_size if n == -1 else min(n, vocab_size) for n in counts), default=LARGEST_COUNT + 1)
        return packed_logprobs(logits, tokens, most, rows) if most <= LARGEST_COUNT else None

    def _upload(self, metadata: SamplingMetadata, wanted: list[int], rows: int, vocab_size: int) -> _Inputs:
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
        if metadata.random is not None:
            arrays |= _random_arrays(metadata.random, rows, vocab_size)
        if 0 < len(wanted) < rows:
            arrays["wanted"] = np.array(wanted, dtype=np.int32)
        return _Inputs(_upload_arrays(arrays, self._device))


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


def _random_arrays(random: RandomRows, rows: int, vocab_size: int) -> _Arrays:
    """Parameters of all rows: one that does not draw has temperature 0 and filters that keep everything."""
    drawing = slice(None) if random.rows is None else random.rows.numpy()

    def per_row(values: torch.Tensor | None, default: float, dtype: type = np.float32) -> _Array:
        result: _Array = np.full(rows, default, dtype=dtype)
        if values is not None:
            result[drawing] = values.numpy().reshape(-1)
        return result

    keys = np.zeros((rows, 2), dtype=np.int64)
    keys[drawing] = [((seed + _SIGNED_64) % (2 * _SIGNED_64) - _SIGNED_64, at) for seed, at in random.keys]
    arrays = {"temperature": per_row(random.temperature, 0.0), "keys": keys}
    if random.filters:
        arrays["min_p"] = per_row(random.min_p, 0.0)
        arrays["top_k"] = per_row(random.top_k, vocab_size, np.int32)
        arrays["top_p"] = per_row(random.top_p, 1.0)
    return arrays


def _upload_arrays(arrays: _Arrays, device: torch.device) -> dict[str, torch.Tensor]:
    """Copies on the device, made by one transfer that nobody waits for, each aligned for a kernel."""
    if not arrays:
        return {}
    ends = np.cumsum([-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays.values()]).tolist()
    staging = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    starts = [0, *ends[:-1]]
    host = staging.numpy()
    for start, array in zip(starts, arrays.values(), strict=True):
        host[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    moved = staging.to(device, non_blocking=True)
    return {
        name: moved[start : start + array.nbytes].view(_torch_dtype(array)).view(array.shape)
        for start, (name, array) in zip(starts, arrays.items(), strict=True)
    }


def _torch_dtype(array: _Array) -> torch.dtype:
    return torch.from_numpy(array[:0]).dtype


def _entries(
    packed: torch.Tensor, token_ids: Sequence[int], num_logprobs: Sequence[int]
) -> list[TokenLogprobs]:
    """The TokenLogprobs of packed logprobs, which are copied from the device at once."""
    columns = [column.tolist() for column in unpack_logprobs(packed.cpu())]
    return logprob_entries(token_ids, *columns, num_logprobs=num_logprobs)
