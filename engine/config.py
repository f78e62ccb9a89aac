"""Every setting of the engine, in one flat frozen record. Command-line flags are made from its fields."""

from collections.abc import Callable
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any, Literal, get_args, get_origin, get_type_hints

from halimede.errors import ConfigError
from halimede.keywords import KeywordChecked
from halimede.scheduler.config import SchedulingPolicy

DType = Literal["auto", "float32", "bfloat16", "float16"]
AttentionBackend = Literal["auto", "triton", "xformers", "torch"]
KVCacheDType = Literal["auto", "fp8", "fp8_e4m3", "int8"]
Jit = Literal["allow", "warn", "forbid"]
LoadFormat = Literal["auto", "hf", "safetensors", "pt", "gguf", "dummy"]
_DTYPE_ALIASES = {"half": "float16", "float": "float32"}
BLOCK_SIZES = (16, 32, 64, 128)


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class EngineConfig(KeywordChecked):
    """Settings of an engine; names and defaults are vLLM's where both have them.

    Raises ConfigError for an unknown keyword, a value out of range or a contradiction.
    """

    model: str = field(
        metadata={"help": "A directory, a .gguf file or a Hugging Face id (repo:QUANT picks a GGUF)."}
    )
    tokenizer: str | None = _option(
        None, "Directory or Hugging Face id of the tokenizer, if not the model's."
    )
    skip_tokenizer_init: bool = _option(False, "Load no tokenizer: prompts and results are token ids.")
    revision: str | None = _option(None, "Branch, tag or commit of the model on the hub.")
    tokenizer_revision: str | None = _option(None, "Branch, tag or commit of the tokenizer on the hub.")
    hf_token: str | None = _option(None, "Access token for gated models; default: the one logged in with.")
    download_dir: str | None = _option(None, "Where downloads go; default: the Hugging Face cache.")
    trust_remote_code: bool = _option(False, "Allow a tokenizer that is code in the model's repository.")
    load_format: LoadFormat = _option(
        "auto",
        "Which weight files to load: auto (safetensors, else .bin or .pt, else GGUF), hf (no GGUF), "
        "safetensors, pt, gguf, or dummy (random weights; only config.json is needed).",
    )
    hf_overrides: dict[str, Any] | Callable[[Any], Any] | None = _option(
        None,
        "Fields laid over the model's config.json, nested ones too; in Python also a function of the config.",
    )
    dtype: DType = _option("auto", "Data type of weights and activations.")
    quantization: str | None = _option(
        None,
        "int4, int8 or fp8: quantize a plain checkpoint's weights while they are loaded; or the checkpoint's "
        "own method, which is read there by default.",
    )
    device: str = _option("auto", "torch device, such as cuda, cuda:1 or cpu.")
    attention_backend: AttentionBackend = _option(
        "auto",
        "What attention runs on: auto (triton on a GPU, torch on a CPU), triton (on a CPU interpreted, to "
        "debug kernels), torch, or xformers (a GPU and halimede[xformers]).",
    )
    kv_cache_dtype: KVCacheDType = _option(
        "auto",
        "Data type of the KV cache: auto (the model's), fp8 (e4m3) or int8 (a scale per token and head). "
        "8 bits halve its memory and need the triton attention backend.",
    )
    jit: Jit = _option(
        "allow",
        "What to do about a GPU kernel that is not in the kernel cache: allow (compile it when needed), "
        "warn (say so, too) or forbid (refuse to start; `halimede warmup` builds what is missing).",
    )
    kernel_cache_dir: str | None = _option(
        None, "Folder of compiled kernels; default: HALIMEDE_KERNEL_CACHE, else ~/.cache/halimede/kernels."
    )
    tensor_parallel_size: int = _option(1, "Number of GPUs that share each layer.")
    enforce_eager: bool = _option(False, "Never capture GPU graphs.")
    lazy_graph_capture: bool = _option(
        False, "Capture a GPU graph when steps of its size come, not all of them at the start."
    )
    async_scheduling: bool = _option(
        True, "On a GPU: schedule and launch a step while the one before it still runs."
    )
    profile: str | None = _option(
        None, "Folder for traces of torch's profiler, one of each run: a generate(), a chat() or a stream."
    )
    seed: int = _option(0, "Seed of requests that have none of their own.")
    max_model_len: int | None = _option(
        None,
        "Tokens of prompt and completion together; default: the model's, or what the KV cache holds.",
    )
    max_num_seqs: int = _option(128, "Sequences that run at once.")
    max_num_batched_tokens: int = _option(2048, "Tokens that one step runs.")
    block_size: int = _option(16, "Tokens per KV cache block: 16, 32, 64 or 128.")
    enable_prefix_caching: bool = _option(True, "Share KV cache blocks between equal prefixes.")
    enable_chunked_prefill: bool = _option(True, "Split long prompts over several steps.")
    gpu_memory_utilization: float = _option(0.92, "Share of the GPU's memory for weights and KV cache.")
    kv_cache_memory_bytes: int | None = _option(
        None,
        "Bytes of KV cache; default: from gpu_memory_utilization, on a CPU a share of free memory.",
    )
    num_gpu_blocks_override: int | None = _option(None, "Number of KV cache blocks, whatever fits.")
    scheduling_policy: SchedulingPolicy = _option("fcfs", "Which request runs next: fcfs or priority.")
    generation_config: Literal["auto", "vllm"] = _option(
        "auto",
        "Where sampling defaults come from: auto (the model's generation_config.json) or vllm (none).",
    )
    chat_template: str | None = _option(None, "Chat template or the path of one, if not the tokenizer's.")
    max_logprobs: int = _option(20, "Most log-probabilities a request may ask per token; -1: no limit.")

    def __post_init__(self) -> None:
        for name in ("tokenizer", "chat_template", "download_dir", "kernel_cache_dir", "profile"):
            if isinstance(getattr(self, name), PathLike):
                object.__setattr__(self, name, fspath(getattr(self, name)))
        spelled = str(self.dtype).removeprefix("torch.")  # torch.bfloat16, and vLLM's short names
        object.__setattr__(self, "dtype", _DTYPE_ALIASES.get(spelled, spelled))
        _check_types(self)
        _check_support(self)
        _check_ranges(self)
        _check_contradictions(self)


def _check_types(c: EngineConfig) -> None:
    """Each field against its annotation: one of a Literal's values, or of one of the types."""
    for name, hint in get_type_hints(EngineConfig).items():
        value, allowed = getattr(c, name), get_args(hint) or (hint,)
        if get_origin(hint) is Literal:
            _check_choice(name, value, allowed)
            continue
        allowed = tuple(get_origin(kind) or kind for kind in allowed)
        matches = isinstance(value, allowed) or (float in allowed and isinstance(value, int))
        if not matches or (isinstance(value, bool) and bool not in allowed):
            names = " or ".join("None" if t is type(None) else t.__name__ for t in allowed)
            raise ConfigError(f"{name}={value!r} is of the wrong type; it must be {names}")


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not one of: {', '.join(map(str, allowed))}")


def _check_support(c: EngineConfig) -> None:
    _check_choice("block_size", c.block_size, BLOCK_SIZES)


def _check_ranges(c: EngineConfig) -> None:
    at_least_one = ("max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size")
    optional = ("max_model_len", "kv_cache_memory_bytes", "num_gpu_blocks_override")
    for name in at_least_one + optional:
        value = getattr(c, name)
        if value is None and name in optional:
            continue
        if value < 1:
            raise ConfigError(f"{name}={value!r} must be at least 1")
    if not 0 < c.gpu_memory_utilization <= 1:
        raise ConfigError(f"gpu_memory_utilization={c.gpu_memory_utilization!r} must be in (0, 1]")
    if c.max_logprobs < -1:
        raise ConfigError(f"max_logprobs={c.max_logprobs!r} must be at least 0, or -1 for no limit")
    if not c.model:
        raise ConfigError("model is empty; give a directory, a .gguf file or a Hugging Face id")


def _check_contradictions(c: EngineConfig) -> None:
    if c.tensor_parallel_size > 1:
        raise ConfigError(
            f"tensor_parallel_size={c.tensor_parallel_size}: more than one device is not supported yet; use 1"
        )
    if c.max_num_batched_tokens < c.max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens={c.max_num_batched_tokens} is less than max_num_seqs={c.max_num_seqs}: "
            "a step could not give each running sequence a token; raise the first or lower the second"
        )
    if c.skip_tokenizer_init and c.tokenizer is not None:
        raise ConfigError(
            f"tokenizer={c.tokenizer!r} contradicts skip_tokenizer_init=True; leave one of them out"
        )
