"""Reads the rotary embedding's settings from either form that config.json has had.

transformers 5 writes one object, rope_parameters; before, rope_theta stood beside an optional rope_scaling.
"""

from typing import get_args

from halimede.engine.config_fields import ConfigFields
from halimede.engine.layers.rope_config import RopeConfig, RopeType
from halimede.errors import ModelLoadError, UnsupportedModelError

_DEFAULT_THETA = 10000.0


def read_rope(fields: ConfigFields, head_dim: int) -> RopeConfig:
    """The rotary embedding of a config. Raises UnsupportedModelError for a rope type that is not known."""
    rope = (
        fields.section("rope_scaling") or fields.section("rope_parameters") or ConfigFields({}, fields.source)
    )
    _refuse_rope_per_layer_type(rope)
    return _read_rope(fields, rope, head_dim, fields.number("rope_theta", _DEFAULT_THETA))


def read_ropes_by_layer_type(
    fields: ConfigFields, head_dim: int, *, global_theta: float, local_theta: float
) -> tuple[RopeConfig, RopeConfig]:
    """The rotary embeddings of the layers that see everything and of those with a sliding window.

    transformers 5 writes rope_parameters per layer type; before, rope_theta and rope_scaling were about the
    first kind alone. The thetas are those of a config that has none.
    """
    by_type = fields.section("rope_parameters") or ConfigFields({}, fields.source)
    if any(by_type.is_section(name) for name in by_type.names()):
        full, sliding = by_type.section("full_attention"), by_type.section("sliding_attention")
    else:
        full, sliding = by_type, None
    empty = ConfigFields({}, fields.source)
    full = fields.section("rope_scaling") or full or empty
    return (
        _read_rope(fields, full, head_dim, fields.number("rope_theta", global_theta)),
        _read_rope(fields, sliding or empty, head_dim, local_theta),
    )


def _read_rope(fields: ConfigFields, rope: ConfigFields, head_dim: int, default_theta: float) -> RopeConfig:
    rope_type = _read_type(rope)
    theta = rope.number("rope_theta", default_theta)
    partial = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    rotary_dim = int(head_dim * partial)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ModelLoadError(
            f"{fields.source}: partial_rotary_factor={partial} of head_dim={head_dim} rotates {rotary_dim} "
            "dimensions, which must be an even number within the head; correct the config"
        )
    trained = fields.integer("max_position_embeddings")
    # Where both levels of the config have it, transformers lets the outer one win.
    original = fields.optional_integer("original_max_position_embeddings")
    original = original or rope.integer("original_max_position_embeddings", trained)
    if rope_type == "linear":
        return RopeConfig(rope_type, theta, rotary_dim, factor=rope.number("factor"))
    if rope_type == "llama3":
        return _llama3(rope, theta, rotary_dim, original)
    if rope_type == "yarn":
        return _yarn(rope, theta, rotary_dim, original, trained)
    if rope_type == "factors":
        return _factors(rope, theta, rotary_dim)
    return RopeConfig("default", theta, rotary_dim)


def _refuse_rope_per_layer_type(rope: ConfigFields) -> None:
    nested = [name for name in rope.names() if rope.is_section(name)]
    if nested:
        raise UnsupportedModelError(
            f"{rope.source}: a rotary embedding per layer type ({', '.join(nested)}) is not supported; "
            "supported: one for all layers"
        )


def _read_type(rope: ConfigFields) -> RopeType:
    name = rope.text("rope_type", rope.text("type", "default"))
    for known in get_args(RopeType):
        if name == known:
            found: RopeType = known
            return found
    raise UnsupportedModelError(
        f"{rope.source}: rope type {name!r} is not supported; supported: {', '.join(get_args(RopeType))}"
    )


def _llama3(rope: ConfigFields, theta: float, rotary_dim: int, original: int) -> RopeConfig:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise rope.wrong("high_freq_factor", high, f"greater than low_freq_factor={low}")
    return RopeConfig(
        "llama3",
        theta,
        rotary_dim,
        factor=rope.number("factor"),
        original_max_position_embeddings=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(rope: ConfigFields, theta: float, rotary_dim: int, original: int, trained: int) -> RopeConfig:
    return RopeConfig(
        "yarn",
        theta,
        rotary_dim,
        factor=rope.number("factor", trained / original),
        original_max_position_embeddings=original,
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
    )


def _factors(rope: ConfigFields, theta: float, rotary_dim: int) -> RopeConfig:
    factors = rope.numbers("factors")
    if len(factors) != rotary_dim // 2:
        raise rope.wrong("factors", factors, f"a list of {rotary_dim // 2} numbers, one per frequency")
    return RopeConfig("factors", theta, rotary_dim, factors=factors)
