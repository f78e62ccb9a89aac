"""The least time that a decoding step can take, by the bytes that it must read, and what is aimed at."""

from collections.abc import Mapping
from typing import Any

from geometry import Geometry

AIMS: dict[str, tuple[float, str]] = {
    "decode, batch 1, context 1024": (241.0, "tok/s"),
    "decode, batch 32, context 1024": (5_700.0, "tok/s"),
    "decode, batch 256, context 1024": (17_000.0, "tok/s"),
    "int4: decode, batch 1, context 1024": (540.0, "tok/s"),
    "fp8: decode, batch 1, context 1024": (425.0, "tok/s"),
    "host gap, batch 1, context 1024": (0.3, "ms"),
    "host gap, batch 32, context 1024": (0.3, "ms"),
    "1,024 in, 1,024 out": (10_000.0, "output tok/s"),
}
"""On an H200 (4.3 TB/s of copy, 141 GB), in bfloat16 where nothing else is said."""

AIM_BYTES_PER_S = 4.3e12
"""Of the card that the aims are for."""

AIMED_AT = "llama-3-8b"


def decode_bytes(
    geometry: Geometry, batch: int, mean_context: float, weight_bytes: int | None = None
) -> float:
    """Bytes that a step of `batch` rows must read: every weight once, keys and values of every row.

    weight_bytes: of the weights; None where they are in bfloat16.
    """
    weights = geometry.streamed_bytes if weight_bytes is None else weight_bytes
    return weights + batch * mean_context * geometry.kv_bytes_per_token


def least_ms(num_bytes: float, bytes_per_s: float) -> float:
    """Milliseconds that so many bytes take at that rate."""
    return num_bytes / bytes_per_s * 1e3


def decode_share(
    geometry: Geometry,
    batch: int,
    mean_context: float,
    ms: float,
    bytes_per_s: float,
    *,
    weight_bytes: int | None = None,
) -> dict[str, Any]:
    """What a step took beside the least it can take; share 1 is all that the memory gives."""
    least = least_ms(decode_bytes(geometry, batch, mean_context, weight_bytes), bytes_per_s)
    return {"roofline_ms": least, "share": least / ms, "roofline_tok_s": batch / least * 1e3}


def aimed_share(name: str, row: Mapping[str, Any], bytes_per_s: float) -> float | None:
    """The share of the roofline that an aim in tok/s comes to; on any card. None where there is no aim.

    row: of the same case, measured on a card with that rate of copy.
    """
    if name not in AIMS:
        return None
    return float(AIMS[name][0] / (row["roofline_tok_s"] * AIM_BYTES_PER_S / bytes_per_s))


def meets(name: str, value: float) -> bool:
    """Whether a value reaches its aim: times are to be shorter, all else is to be more."""
    aim, unit = AIMS[name]
    return value <= aim if unit == "ms" else value >= aim
