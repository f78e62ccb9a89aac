"""The oracle of qk_norm_rotary_kv_write, and its inputs: memory that is not written is poison."""

from typing import Any

import torch

from halimede.kernels.kv_cache import write_kv_reference
from halimede.kernels.norm import rms_norm_reference
from halimede.kernels.rotary import apply_rotary_reference
from halimede.kernels.spec import Case, Tensors, Work

_LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_POISON = 777.0


def qk_norm_rotary_kv_write_reference(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    interleaved: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """The oracle of qk_norm_rotary_kv_write: the three references one after the other, float64 in between."""
    sizes = [num_heads, num_kv_heads, num_kv_heads]
    q_given, k_given, v_given = qkv.view(qkv.shape[0], sum(sizes), k_cache.shape[-1]).split(sizes, dim=1)
    q, k, v = q_given.double(), k_given.double(), v_given.double()
    if q_weight is not None and k_weight is not None:
        q, k = rms_norm_reference(q, q_weight, eps), rms_norm_reference(k, k_weight, eps)
    if cos is not None and sin is not None:
        q, k = (_turn(x, cos[positions], sin[positions], interleaved) for x in (q, k))
    q_given.copy_(q)
    written = slot_mapping >= 0
    slots, k, v = slot_mapping[written], k[written], v[written]
    if k_scale is not None and v_scale is not None:
        (k, k_own), (v, v_own) = _quantize(k, k_scale, k_cache.dtype), _quantize(v, v_scale, v_cache.dtype)
        if k_scale.dim() == 3:
            write_kv_reference(k_own, v_own, k_scale[..., None], v_scale[..., None], slots)
    write_kv_reference(k, v, k_cache, v_cache, slots)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """apply_rotary_reference of pairs that are neighbours: brought to halves, and back."""
    if not interleaved:
        return apply_rotary_reference(x, cos, sin)
    half = cos.shape[-1]
    x = torch.cat((x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2], x[..., 2 * half :]), dim=-1)
    x = apply_rotary_reference(x, cos, sin)
    pairs = torch.stack((x[..., :half], x[..., half : 2 * half]), dim=-1).flatten(-2)
    return torch.cat((pairs, x[..., 2 * half :]), dim=-1)


def _quantize(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> Tensors:
    """x (T, K, D) in the cache's dtype, and its scale, (1) or (T, K, 1)."""
    limit = _LIMITS[dtype]
    used = scale.double() if scale.dim() == 1 else x.abs().amax(-1, keepdim=True).clamp(min=1e-20) / limit
    steps = (x / used).clamp(-limit, limit)
    return (steps.round() if dtype == torch.int8 else steps).to(dtype), used


def outputs(given: dict[str, Any]) -> Tensors:
    """What was changed; NaN, which equals nothing, as a number."""
    return given["qkv"], *(torch.nan_to_num(given[name], nan=_POISON) for name in ("k_cache", "v_cache"))


def reference(**given: Any) -> Tensors:
    """The oracle's outputs."""
    qk_norm_rotary_kv_write_reference(**given)
    return outputs(given)


def outputs_in_steps(given: dict[str, Any]) -> Tensors:
    """What was changed of a call with caches of 8 bits: qkv, the caches in steps of their scales, the scales.

    Steps of int8 are float32, of float8_e4m3fn float16 and scales float64: each has a tolerance of its own.
    """
    steps = torch.float32 if given["k_cache"].dtype == torch.int8 else torch.float16
    caches = (torch.nan_to_num(given[name].to(steps), nan=_POISON) for name in ("k_cache", "v_cache"))
    scales = (torch.nan_to_num(given[name].double(), nan=_POISON) for name in ("k_scale", "v_scale"))
    return given["qkv"], *caches, *scales


def exact_in_steps(**given: Any) -> Tensors:
    """outputs_in_steps as they would be without rounding: a right kernel is off by at most half a step."""
    dtype = given["k_cache"].dtype
    exact = dict(given)
    for name in ("k", "v"):
        nothing = torch.full(given[f"{name}_cache"].shape, torch.nan, dtype=torch.float64)
        exact |= {f"{name}_cache": nothing, f"{name}_scale": None}
    qk_norm_rotary_kv_write_reference(**exact)
    for name in ("k", "v"):
        cache, scale = exact[f"{name}_cache"], given[f"{name}_scale"].double()
        if scale.dim() == 3:
            scale = cache.abs().amax(-1).clamp(min=1e-20) / _LIMITS[dtype]
        steps = cache / (scale if scale.dim() == 1 else scale[..., None])
        steps = steps.clamp(-_LIMITS[dtype], _LIMITS[dtype])
        # int8 has no NaN: untouched memory is -128.
        exact[f"{name}_cache"] = torch.nan_to_num(steps, nan=-128.0) if dtype == torch.int8 else steps
        exact[f"{name}_scale"] = scale
    kind = torch.float32 if dtype == torch.int8 else torch.float16
    caches = (torch.nan_to_num(exact[name].to(kind), nan=_POISON) for name in ("k_cache", "v_cache"))
    scales = (torch.nan_to_num(exact[name], nan=_POISON) for name in ("k_scale", "v_scale"))
    return exact["qkv"], *caches, *scales


def make_tokens(
    device: torch.device,
    tokens: int,
    heads: tuple[int, int],
    head_dim: int,
    *,
    rotary_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
    interleaved: bool = False,
    scale_per_head: bool = False,
    padding: int = 0,
    gap: int | None = None,
    block_size: int = 16,
    num_blocks: int | None = None,
    max_positions: int = 64,
) -> dict[str, Any]:
    """Keyword arguments of qk_norm_rotary_kv_write for `tokens` tokens and (H, K) heads.

    rotary_dim: None is head_dim, 0 no rotation. weight_dtype: None is no norm. padding: the last tokens,
    whose slot is -1. gap: elements between tokens, None is none and a qkv of three dimensions.
    """
    (num_heads, num_kv_heads), cache_dtype = heads, cache_dtype or dtype
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    num_blocks = tokens // block_size + 2 if num_blocks is None else num_blocks
    width = (num_heads + 2 * num_kv_heads) * head_dim
    qkv = (torch.randn(tokens, width + (gap or 0), device=device) * 2).to(dtype)[:, :width]
    slots = torch.randperm(num_blocks * block_size, device=device)[:tokens]
    slots[tokens - padding :] = -1
    made: dict[str, Any] = {
        "qkv": qkv.view(tokens, -1, head_dim) if gap is None and tokens else qkv,
        "positions": torch.randint(max_positions, (tokens,), device=device),
        "cos": None,
        "sin": None,
        "slot_mapping": slots,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "interleaved": interleaved,
    }
    if rotary_dim:
        angles = torch.rand(max_positions, rotary_dim // 2, device=device) * 100
        made |= {"cos": angles.cos(), "sin": angles.sin()}
    if weight_dtype is not None:
        weights = (1 + torch.randn(2, head_dim, device=device) / 4).to(weight_dtype)
        made |= {"q_weight": weights[0], "k_weight": weights[1].clone(), "eps": 1e-6}
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    return made | _poisoned_caches(device, shape, cache_dtype, scale_per_head)


def _poisoned_caches(
    device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype, scale_per_head: bool
) -> dict[str, Any]:
    made = {}
    for name, scale in (("k", 0.02), ("v", 0.03)):
        poison = -128 if dtype == torch.int8 else torch.nan
        made[f"{name}_cache"] = torch.full(shape, poison, device=device).to(dtype)
        if dtype.itemsize == 1:
            per_head = torch.full(shape[:3], torch.nan, device=device)
            made[f"{name}_scale"] = per_head if scale_per_head else torch.full((1,), scale, device=device)
    return made


def _case(
    name: str, tokens: int, heads: tuple[int, int], head_dim: int, *, zero: bool = False, **options: Any
) -> Case:
    """zero: the first token's k and v are zeros."""

    def make(device: torch.device) -> dict[str, Any]:
        made = make_tokens(device, tokens, heads, head_dim, **options)
        if zero:
            made["qkv"].view(tokens, -1, head_dim)[0, heads[0] :] = 0
        return made

    size = options.get("dtype", _BF16).itemsize
    cache_size = (options.get("cache_dtype") or options.get("dtype", _BF16)).itemsize
    moved = (2 * heads[0] + 2 * heads[1]) * size + 2 * heads[1] * cache_size
    return Case(name, make, Work(bytes=tokens * head_dim * moved))


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_E4M3, _INT8 = torch.float8_e4m3fn, torch.int8

CASES = (
    *(_case(f"halves {t}", 5, (4, 2), 16, dtype=t) for t in (_BF16, _FP16, _FP32)),
    *(_case(f"neighbours {t}", 5, (4, 2), 24, dtype=t, interleaved=True) for t in (_BF16, _FP16, _FP32)),
    *(_case(f"norm {t}", 5, (3, 1), 80, dtype=t, weight_dtype=t) for t in (_BF16, _FP16, _FP32)),
    _case("float32 norm, head of 256", 9, (4, 1), 256, weight_dtype=_FP32),
    _case("norm, part turns", 3, (4, 2), 80, rotary_dim=32, weight_dtype=_BF16),
    _case("norm, part turns, neighbours", 3, (2, 2), 24, rotary_dim=12, weight_dtype=_FP32, interleaved=True),
    _case("norm alone", 4, (3, 2), 96, rotary_dim=0, weight_dtype=_BF16),
    _case("neither norm nor rotation", 4, (3, 2), 8, rotary_dim=0),
    _case("no token", 0, (4, 2), 64),
    _case("one token", 1, (9, 3), 64),
    _case("many tokens", 67, (6, 2), 128),
    _case("head of 192", 4, (5, 5), 192),
    _case("gap between tokens", 6, (4, 2), 8, gap=24),
    _case("padding", 21, (2, 1), 64, padding=7, block_size=32),
    _case("only padding", 3, (2, 1), 8, padding=3),
    _case("rounded cache", 5, (2, 2), 16, dtype=_FP32, cache_dtype=_BF16),
    _case("wider cache", 5, (2, 2), 16, cache_dtype=_FP32),
)
CASES_8BIT = tuple(
    _case(
        f"{name} {t} {'per head' if own else 'one scale'}", *shape, cache_dtype=t, scale_per_head=own, **more
    )
    for t in (_E4M3, _INT8)
    for own in (False, True)
    for name, shape, more in (
        ("halves", (7, (2, 2), 64), {"zero": True}),
        ("norm, part turns", (5, (2, 1), 80), {"rotary_dim": 32, "weight_dtype": _BF16, "padding": 2}),
        ("neighbours", (3, (1, 2), 24), {"interleaved": True}),
        ("no rotation", (3, (1, 2), 16), {"rotary_dim": 0}),
    )
)

_STEP: dict[str, Any] = {"num_blocks": 2048, "max_positions": 8192}
SIGNATURES = (
    _case("Llama 3 8B", 256, (32, 8), 128, **_STEP),
    _case("Llama 3.2 1B, float16", 256, (32, 8), 64, dtype=_FP16, **_STEP),
    _case("Qwen3 8B", 256, (32, 8), 128, weight_dtype=_BF16, **_STEP),
    _case("Gemma 3 4B", 256, (8, 4), 256, weight_dtype=_FP32, **_STEP),
    _case("Phi 2", 256, (32, 32), 80, rotary_dim=32, **_STEP),
    _case("GPT-J", 256, (16, 16), 256, rotary_dim=64, interleaved=True, **_STEP),
    _case("SmolLM3, a layer without rotation", 256, (16, 4), 128, rotary_dim=0, **_STEP),
)
SIGNATURES_8BIT = (
    _case("Llama 3 8B, e4m3", 256, (32, 8), 128, cache_dtype=_E4M3, **_STEP),
    _case("Llama 3 8B, e4m3 per head", 256, (32, 8), 128, cache_dtype=_E4M3, scale_per_head=True, **_STEP),
    _case(
        "Qwen3 8B, int8 per head",
        256,
        (32, 8),
        128,
        cache_dtype=_INT8,
        scale_per_head=True,
        weight_dtype=_BF16,
        **_STEP,
    ),
    _case("Llama 3 8B, int8", 256, (32, 8), 128, cache_dtype=_INT8, **_STEP),
)
