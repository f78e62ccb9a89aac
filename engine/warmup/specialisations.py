"""Every specialisation of every kernel that serving a model needs, found by running the model's own code.

The model is built on the meta device and given every kind of step there is; launches note what they would
have been compiled for. So whatever the layers, the sampler and the launchers decide is decided by themselves.
"""

from collections.abc import Iterator, Sequence

import torch

from halimede.engine.config import EngineConfig
from halimede.engine.layers.attention_gpu import (
    Attend,
    GpuBackend,
    PagedAttention,
    PagedRows,
    TritonAttention,
)
from halimede.engine.model_input import KVCache
from halimede.engine.models.base import CausalLM
from halimede.engine.models.config import ModelConfig
from halimede.engine.quant.forms.base import WeightForm
from halimede.engine.runner.device_rows import DeviceRows
from halimede.engine.runner.kv_cache import KVCacheSpec, allocate_kv_caches
from halimede.engine.runner.rows import RowLimits
from halimede.engine.runner.sampling_metadata import build_sampling_metadata
from halimede.engine.runner.settings import ExecutionSettings
from halimede.engine.warmup.meta_model import meta_models
from halimede.engine.warmup.steps import model_steps, sampling_plans
from halimede.kernels.gpu.logprobs import LIMITS
from halimede.kernels.launch import Launch, intercepting
from halimede.kernels.specialise import Specialisation
from halimede.kernels.target import Target
from halimede.kernels.tuning import tuned_sizes

_META = torch.device("meta")
_LONG_STORAGE = 1 << 31
# Nothing is compiled differently for another length, but the split size, which the backend is told.
_POSITIONS = 16


def serving_specialisations(
    config: EngineConfig, model_config: ModelConfig, settings: ExecutionSettings, target: Target
) -> list[Specialisation]:
    """What serving may launch on a target, each once, in the order of first use.

    settings: as resolved for that GPU or for the device "meta".
    """
    found: dict[str, Specialisation] = {}

    def note(launch: Launch) -> None:
        specialisation = launch.specialise(target)
        found.setdefault(specialisation.key, specialisation)

    with intercepting(target, note), torch.inference_mode():
        _run_steps(config, model_config, settings, target)
    return list(found.values())


def serving_launches(
    config: EngineConfig,
    model_config: ModelConfig,
    settings: ExecutionSettings,
    target: Target,
    sizes: Sequence[int],
) -> list[Launch]:
    """What serving launches on a target in steps of so many tokens, on meta tensors, and to choose tokens."""
    found: list[Launch] = []
    with intercepting(target, found.append), torch.inference_mode():
        _run_steps(config, model_config, settings, target, sizes)
    return found


def _run_steps(
    config: EngineConfig,
    model_config: ModelConfig,
    settings: ExecutionSettings,
    target: Target,
    sizes: Sequence[int] | None = None,
) -> None:
    """sizes: of the only steps, in tokens; None: the fewest, the most, and those that meet every choice.

    With sizes, no step leaves out hidden states that are no outputs: the last layer would have other sizes.
    """
    for model in meta_models(model_config, settings.dtype):
        model.prepare(_META, settings.activations, _POSITIONS, backend=_backend(config, settings))
        spec = KVCacheSpec.from_model(
            model.config, dtype=settings.kv_cache_dtype, block_size=config.block_size
        )
        for kv_caches in _caches(spec, target):
            for step in model_steps(
                config.max_num_seqs,
                config.max_num_batched_tokens,
                settings.max_model_len,
                _sizes(model, target) if sizes is None else sizes,
            ):
                if sizes is None or (step.outputs is None and step.input_ids.shape[0] in sizes):
                    model.compute_logits(model(step, kv_caches))
    hidden = torch.empty(2, model_config.hidden_size, dtype=settings.activations, device=_META)
    limits = RowLimits(
        config.max_num_seqs, config.max_num_batched_tokens, settings.max_model_len, config.block_size
    )
    rows = DeviceRows(limits, _META)
    for plan in sampling_plans(model_config.vocab_size, _logprob_counts(config, model_config)):
        rows.prepare(plan)
        metadata = build_sampling_metadata(plan, vocab_size=model_config.vocab_size)
        rows.choose_with(plan)(model.compute_logits(hidden[: len(plan.layout.sampled)]), metadata)


def _backend(config: EngineConfig, settings: ExecutionSettings) -> GpuBackend:
    attention: PagedAttention = _NoKernels()
    if settings.attention == "triton":
        attention = TritonAttention(settings.max_model_len, config.max_num_seqs)
    return GpuBackend(attention)


def _sizes(model: CausalLM, target: Target) -> list[int]:
    """Numbers of tokens and rows that together meet every choice that hangs on them."""
    sizes = set(tuned_sizes(target))
    for module in model.modules():
        if isinstance(module, WeightForm):
            sizes.update(module.row_buckets, [module.row_buckets[-1] + 1] if module.row_buckets else [])
    return sorted(sizes)


def _caches(spec: KVCacheSpec, target: Target) -> Iterator[tuple[KVCache, ...]]:
    """Caches of every size that makes a difference; how large it will be hangs on the GPU's memory."""
    yield allocate_kv_caches(spec, 2, _META)
    if target.backend == "hip":
        # Triton for AMD compiles other code for tensors that 32-bit offsets do not reach all of.
        block = spec.num_kv_heads * spec.block_size * spec.head_dim * spec.dtype.itemsize
        yield allocate_kv_caches(spec, -(-_LONG_STORAGE // block), _META)


def _logprob_counts(config: EngineConfig, model_config: ModelConfig) -> list[int]:
    """A number for each kernel that the requests' numbers of log-probabilities can lead to."""
    most = model_config.vocab_size
    if config.max_logprobs >= 0:
        most = min(most, config.max_logprobs)
    counts = [0]
    for limit in LIMITS:
        if most > counts[-1]:
            counts.append(min(most, limit))
    return counts


class _NoKernels:
    """A PagedAttention that is not Triton's, as far as Triton is concerned."""

    def prepare(self, rows: PagedRows, kv_cache: KVCache, num_heads: int, window: int | None) -> Attend:
        """As PagedAttention.prepare."""

        def attend(q: torch.Tensor, kv_cache: KVCache, scale: float) -> torch.Tensor:
            return torch.empty(q.shape, dtype=q.dtype, device=q.device)

        return attend
