"""Blocks, splits, warps and stages of scaled_matmul where no table says otherwise.

From what an H100 did with Llama-3-8B's four shapes (docs/perf-log.md).
"""

import itertools
from collections.abc import Iterator, Sequence

from halimede.kernels.gpu.scaled_operand import Scaling
from halimede.kernels.target import Target
from halimede.kernels.tuning import KernelConfig

ROW_BUCKETS = (16, 32, 64, 128, 256, 1 << 30)
"""Numbers of rows up to which one choice is made; the last has no end."""

_LEAST_COLUMNS = 1024  # of a split
_MOST_SPLITS = 16
_TRIED_SPLITS = (1, 2, 4)
_TRIED_STAGES = {"cuda": (3, 4, 6), "hip": (1, 2)}
_MOST_SUMS = 128  # registers of a thread; sums that are added up beside their product take twice as many
_WIDE = 128 * 198  # rows of a weight that keeps all processors busy with blocks of 128


def config_for(
    target: Target, scaling: Scaling, bucket: int, unit: int, *, deterministic: bool
) -> KernelConfig:
    """bucket: of ROW_BUCKETS. unit: of x's stride, see aligned_strides. deterministic: as with few rows."""
    if target.backend == "hip":
        return _hip_config(target, scaling, bucket, deterministic)
    if bucket <= 64 or deterministic:
        return _few_rows(target, scaling, min(bucket, 64), deterministic)
    tma = can_be_described(target, scaling, unit, bucket)
    blocked = scaling.block is not None
    if bucket <= 256 or not target.wgmma:
        wide = scaling.shape[0] >= _WIDE and target.wgmma and not blocked
        block_n = 128 if blocked and target.wgmma else 64
        block_m = 128 if wide else 32 if blocked and not target.wgmma else 64
        return _config(target, scaling, 1, block_m, block_n, 4, 4, tma=tma and blocked)
    if blocked:
        return _config(target, scaling, 1, 64, 128, 4, 3, tma=tma, group_m=8)
    if scaling.kind == "wide":
        return _config(target, scaling, 1, 128, 128, 8, 3)
    if scaling.kind == "int8":
        return _config(target, scaling, 1, 256, 128, 8, 4, tma=tma, group_m=8)
    return _config(target, scaling, 1, 256, 128, 8, 3, promote=False)


def can_be_described(target: Target, scaling: Scaling, unit: int, bucket: int) -> bool:
    """Whether the tensor memory accelerator can read both operands. unit, bucket: as config_for has them."""
    aligned = unit == 16 and scaling.shape[1] % 16 == 0
    # Up to 16 rows may be a single one, and that has no stride to describe.
    return target.wgmma and aligned and scaling.kind != "wide" and bucket > 16


def _few_rows(target: Target, scaling: Scaling, block_m: int, deterministic: bool) -> KernelConfig:
    """Some 128 programs, with as many tiles ahead as fit: K is split only where N is narrow."""
    block_n = 64
    if scaling.block is not None and block_m > 16 and not deterministic:
        block_n = 128
    tiles = -(-scaling.shape[0] // block_n)
    most_splits = 128 if block_n == 128 else _MOST_SPLITS
    splits = max(1, min(128 // tiles, scaling.shape[1] // _LEAST_COLUMNS, most_splits))
    many = 4 if scaling.shape[0] >= _WIDE or block_n == 128 else 6
    return _config(target, scaling, splits, block_m, block_n, 4, many)


def _config(
    target: Target,
    scaling: Scaling,
    splits: int,
    block_m: int,
    block_n: int,
    warps: int,
    stages: int,
    *,
    block_k: int = 128,
    tma: bool = False,
    group_m: int = 16,
    promote: bool = True,
) -> KernelConfig:
    """stages: the most; as many are taken as shared memory has for two programs of 4 warps, or one of 8."""
    tile = block_k * (block_n + block_m * (2 if scaling.kind == "wide" else 1))
    programs = 2 if warps == 4 else 1
    stages = max(2, min(stages, (target.shared_memory // programs - 2048) // tile + (programs == 1)))
    blocks = {
        "SPLITS": splits,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP_M": group_m,
        "PROMOTE": int(promote),
        "TMA": int(tma),
        "STAGES": stages,
    }
    return KernelConfig(blocks, num_warps=warps, num_stages=stages)


def _hip_config(target: Target, scaling: Scaling, bucket: int, deterministic: bool) -> KernelConfig:
    few = bucket <= 64 or deterministic
    block_m, block_n = min(bucket, 64), 64
    if target.warp_size == 32:
        block_m = min(block_m, 32)
    elif not few:
        block_n = 128
    block_k = 128 if target.shared_memory > 64 << 10 or scaling.block is not None else 64
    tiles = -(-scaling.shape[0] // block_n)
    splits = max(1, min(264 // tiles, scaling.shape[1] // _LEAST_COLUMNS, _MOST_SPLITS)) if few else 1
    return _config(target, scaling, splits, block_m, block_n, 4, 2, block_k=block_k)


def candidates(target: Target, scaling: Scaling, bucket: int, unit: int) -> list[KernelConfig]:
    """What tuning tries for a number of rows: config_for's choice, and then what lies around it.

    Around it: its own blocks with other splits and stages, other blocks with as many programs or so, and
    tiles that the tensor memory accelerator reads. What a product sums up where stays as it is.
    """
    own = config_for(target, scaling, bucket, unit, deterministic=False)
    found = [own]
    own_tile = own.blocks["BLOCK_M"], own.blocks["BLOCK_N"], own.num_warps
    described = can_be_described(target, scaling, unit, bucket)
    for block_m, block_n, warps in _tiles(target, scaling, own, bucket):
        is_own = (block_m, block_n, warps) == own_tile
        near = _splits_near(scaling, own, block_n) if bucket <= 64 else [1]
        tile = {"BLOCK_M": block_m, "BLOCK_N": block_n}
        stages = sorted({own.blocks["STAGES"], *_TRIED_STAGES[target.backend]})
        for splits, number in itertools.product(near if is_own else near[:1], stages):
            found.append(_changed(own, warps, **tile, SPLITS=splits, STAGES=number, TMA=0))
        if described:
            for number in stages if is_own else (4,):
                found.append(_changed(own, warps, **tile, SPLITS=near[0], STAGES=number, TMA=1))
    return [one for one in found if one == own or _fits(target, scaling, one)]


def _tiles(
    target: Target, scaling: Scaling, own: KernelConfig, bucket: int
) -> Iterator[tuple[int, int, int]]:
    """(BLOCK_M, BLOCK_N, warps). As many rows as there are, or half of them; of many 32 to 256."""
    blocks_m: Sequence[int] = (64, 128)
    if bucket <= 64:
        blocks_m = (bucket, bucket // 2) if bucket > 16 else (bucket,)
    elif own.blocks["BLOCK_M"] < 64:
        blocks_m = (32, 64)
    shapes = ((64, 4), (128, 4), (128, 8)) if target.backend == "cuda" else ((64, 4), (128, 4))
    tiles = [(block_m, *shape) for block_m, shape in itertools.product(blocks_m, shapes)]
    if 16 < bucket <= 64:
        tiles = [tile for tile in tiles if tile[2] == 4]
    elif bucket > 256 and target.wgmma:
        tiles = [(64, 128, 4), (128, 128, 4), (128, 128, 8), (256, 128, 8), (128, 256, 8)]
    adds = scaling.kind != "int8" and (scaling.block is not None or own.blocks["PROMOTE"] == 1)
    most = _MOST_SUMS // (2 if adds else 1)
    yield from (tile for tile in tiles if tile[0] * tile[1] <= tile[2] * target.warp_size * most)


def _splits_near(scaling: Scaling, own: KernelConfig, block_n: int) -> list[int]:
    """Those that a weight is long enough for, the one with about as many programs as `own` has first."""
    wanted = own.blocks["SPLITS"] * block_n / own.blocks["BLOCK_N"]
    splits = {own.blocks["SPLITS"], *_TRIED_SPLITS} if block_n == own.blocks["BLOCK_N"] else _TRIED_SPLITS
    fitting = [one for one in splits if one == 1 or scaling.shape[1] >= 512 * one]
    return sorted(fitting, key=lambda one: (max(one / wanted, wanted / one), one))[:3]


def _changed(config: KernelConfig, warps: int, **blocks: int) -> KernelConfig:
    """With other warps and blocks."""
    merged = {**config.blocks, **blocks}
    return KernelConfig(merged, num_warps=warps, num_stages=merged["STAGES"])


def _fits(target: Target, scaling: Scaling, config: KernelConfig) -> bool:
    """Whether shared memory may hold its stages; an AMD GPU's tiles pass through registers."""
    blocks = config.blocks
    widths = blocks["BLOCK_N"] + blocks["BLOCK_M"] * (2 if scaling.kind == "wide" else 1)
    return target.backend == "hip" or widths * blocks["BLOCK_K"] * blocks["STAGES"] <= target.shared_memory
