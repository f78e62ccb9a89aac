"""Every specialisation of every kernel that serving a model needs, found by running the model's own code.

The model is built on the meta device and given every kind of step there is; launches note what they would
have been compiled for. So whatever the layers, the sampler and the launchers decide is decided by themselves.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from halimede.engine.config import EngineConfig
from halimede.engine.layers.attention_gpu import (
    Attend,
    GpuBackend,
    PagedAttention,
    PagedRows,
    TritonAttention,
)
from halimede.engine.layers.embedding import Embedding
from halimede.engine.layers.linear import Linear
from halimede.engine.loader.quantized import find_quantized
from halimede.engine.loader.weights import assign_parameters, parameter_dtype
from halimede.engine.model_input import KVCache
from halimede.engine.models.base import CausalLM
from halimede.engine.models.config import ModelConfig
from halimede.engine.models.registry import build_model
from halimede.engine.quant.forms.base import Placement, UnloadedForm
from halimede.engine.runner.device_rows import DeviceRows
from halimede.engine.runner.kv_cache import KVCacheSpec, allocate_kv_caches
from halimede.engine.runner.rows import RowLimits
from halimede.engine.runner.sampling_metadata import build_sampling_metadata
from halimede.engine.runner.settings import ExecutionSettings
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


def _run_steps(
    config: EngineConfig, model_config: ModelConfig, settings: ExecutionSettings, target: Target
) -> None:
    for quantized in _quantized_variants(model_config):
        model = _model_on_meta(config, model_config, settings, quantized)
        spec = KVCacheSpec.from_model(
            model.config, dtype=settings.kv_cache_dtype, block_size=config.block_size
        )
        for kv_caches in _caches(spec, target):
            for step in model_steps(
                config.max_num_seqs,
                config.max_num_batched_tokens,
                settings.max_model_len,
                tuned_sizes(target),
            ):
                model(step, kv_caches)
    hidden = torch.empty(2, model_config.hidden_size, dtype=settings.activations, device=_META)
    limits = RowLimits(
        config.max_num_seqs, config.max_num_batched_tokens, settings.max_model_len, config.block_size
    )
    rows = DeviceRows(limits, _META)
    for plan in sampling_plans(model_config.vocab_size, _logprob_counts(config, model_config)):
        rows.prepare(plan)
        metadata = build_sampling_metadata(plan, vocab_size=model_config.vocab_size)
        rows.choose_with(plan)(model.compute_logits(hidden[: len(plan.layout.sampled)]), metadata)


def _caches(spec: KVCacheSpec, target: Target) -> Iterator[tuple[KVCache, ...]]:
    """Caches of every size that makes a difference; how large it will be hangs on the GPU's memory."""
    yield allocate_kv_caches(spec, 2, _META)
    if target.backend == "hip":
        # Triton for AMD compiles other code for tensors that 32-bit offsets do not reach all of.
        block = spec.num_kv_heads * spec.block_size * spec.head_dim * spec.dtype.itemsize
        yield allocate_kv_caches(spec, -(-_LONG_STORAGE // block), _META)


def _quantized_variants(config: ModelConfig) -> list[frozenset[str]]:
    """Which modules are quantized, by the end of their names, in each kind of layer that the model has.

    Only those matter in whose place a kernel runs when they are not quantized.
    """
    modules = find_quantized(build_model(config), config.quantization)
    names = [module.path.rpartition(".")[2] for module in modules]
    embedding = {"embed_tokens"} & set(names)
    gates = names.count("gate_up_proj")
    variants = [frozenset(embedding)] if gates < config.num_hidden_layers else []
    return [*variants, frozenset(embedding | {"gate_up_proj"})] if gates else variants


def _model_on_meta(
    engine_config: EngineConfig, config: ModelConfig, settings: ExecutionSettings, quantized: frozenset[str]
) -> CausalLM:
    model = build_model(_with_few_layers(config))
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in quantized and isinstance(module, Linear | Embedding):
            shape = module.weight.shape[0], module.weight.shape[1]
            module.take_form(UnloadedForm(shape, Placement(_META, settings.dtype)))
    assign_parameters(
        model,
        {
            name: torch.empty(
                parameter.shape, dtype=parameter_dtype(model, name, settings.dtype), device=_META
            )
            for name, parameter in model.named_parameters()
        },
    )
    attention: PagedAttention = _NoKernels()
    if settings.attention == "triton":
        attention = TritonAttention(settings.max_model_len, engine_config.max_num_seqs)
    model.prepare(_META, settings.activations, _POSITIONS, backend=GpuBackend(attention))
    return model


def _with_few_layers(config: ModelConfig) -> ModelConfig:
    """A layer of each kind and the last one, which is run for the outputs alone; layers differ by window."""
    kinds = list(dict.fromkeys(config.sliding_windows))
    if config.num_hidden_layers <= len(kinds) + 1:
        return config
    windows = (*kinds, config.sliding_windows[-1])
    return replace(config, num_hidden_layers=len(windows), sliding_windows=windows)


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
