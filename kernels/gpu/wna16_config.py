"""Blocks, splits, warps and stages of wna16_matmul where no table says otherwise.

Chosen from what an H100 did with Llama-3-8B's four shapes (docs/perf-log.md): with few rows 64 rows of the
weight a program, and K split until some 500 programs are under way, each with 8 units or more; a wide
weight takes 128 rows and no split. With more rows the batch is cut in 64, and programs need not be as many.
"""

import itertools
from collections.abc import Iterator, Sequence

from halimede.kernels.gpu.wna16_layout import UNIT, Facts
from halimede.kernels.target import Target
from halimede.kernels.tuning import KernelConfig

ROW_BUCKETS = (16, 32, 64, 128, 256, 512, 1 << 30)
"""Numbers of rows up to which one choice is made; the last has no end."""

_WIDE = 198  # row blocks of 128: one and a half for each processor of a large GPU
_LEAST_UNITS = 8  # of a split: fewer, and adding up costs more than it saves
_MOST_SPLITS = 16
_TRIED_SPLITS = (1, 2, 4, 8)
_TRIED_STAGES = {"cuda": (3, 4, 6), "hip": (1, 2)}
_MOST_SUMS = 64  # float32 registers of a thread, where sums of groups take as many again


def config_for(target: Target, facts: Facts, bucket: int, *, deterministic: bool) -> KernelConfig:
    """bucket: of ROW_BUCKETS. deterministic: one choice for all of them but for the rows of a block."""
    if target.backend == "hip":
        splits = _splits(facts, 64, 256) if bucket <= 64 else 1
        widest = 64 if target.warp_size == 64 else 16  # where products take more registers
        return _config(target, facts, False, splits, min(bucket, widest), 64, 4)
    few = facts.can_scale_sums
    if deterministic:
        return _config(target, facts, few, _splits(facts, 64, 512), min(bucket, 64), 64, 4)
    wide = facts.shape[0] >= 128 * _WIDE
    if bucket <= 64:
        block_n = 128 if wide and (bucket > 32 or few) else 64
        splits = 1 if wide else _splits(facts, block_n, 512 if bucket <= 16 else 264)
        return _config(target, facts, few, splits, bucket, block_n, 4)
    if bucket <= 256 or not target.wgmma:
        few = few and target.name != "sm_120"  # it would spill
        block_n, warps = (128, 8) if wide and bucket > 128 else (64, 4)
        block_m = 128 if wide and bucket == 128 and target.wgmma else 64
        splits = _splits(facts, block_n, 128) if bucket <= 128 else 1
        return _config(target, facts, few, splits, block_m, block_n, warps)
    if bucket <= 512:
        return _config(target, facts, few, 1, 128, 128, 8)
    return _config(target, facts, False, 1, 256, 128, 8)


def _config(
    target: Target, facts: Facts, few: bool, splits: int, block_m: int, block_n: int, warps: int
) -> KernelConfig:
    stages = _stages(target, facts, block_m, block_n, warps)
    blocks = {
        "SCALE_SUMS": int(few),
        "SPLITS": splits,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "WARP_GROUPS": warps // 4,
        "STAGES": stages,
    }
    return KernelConfig(blocks, num_warps=warps, num_stages=stages)


def _splits(facts: Facts, block_n: int, programs: int) -> int:
    tiles = -(-facts.shape[0] // block_n)
    units = -(-facts.shape[1] // UNIT)
    return max(1, min(programs // tiles, units // _LEAST_UNITS, _MOST_SPLITS))


def _stages(target: Target, facts: Facts, block_m: int, block_n: int, warps: int) -> int:
    """As many units ahead as shared memory holds for the programs of a processor: 2 or 3 of 4 warps, 1 of
    8."""
    if target.backend == "hip":
        return 1 if facts.has_table and target.warp_size == 32 else 2
    unit = UNIT * (block_n * facts.bits // 8 + 2 * block_m) + 16 * block_n
    programs = 1 if warps == 8 else 3 if block_m == block_n == 64 else 2
    most = 6 if block_n == 128 and block_m <= 16 else 4
    if target.name == "sm_100" and facts.has_offsets:
        most = 2  # more, and it would spill
    return max(2, min(most, (target.shared_memory // programs - 2048) // unit))


def candidates(target: Target, facts: Facts, bucket: int) -> list[KernelConfig]:
    """What tuning tries for a number of rows: config_for's choice, and then what lies around it.

    Around it: other blocks with about as many programs, and its own blocks with fewer and more programs,
    stages, and scaled sums in place of scaled weights or the other way round.
    """
    own = config_for(target, facts, bucket, deterministic=False)
    found = [own]
    own_tile = own.blocks["BLOCK_M"], own.blocks["BLOCK_N"], own.num_warps
    for block_m, block_n, warps in _tiles(target, bucket):
        is_own = (block_m, block_n, warps) == own_tile
        near = _splits_near(facts, own, block_m, block_n, bucket)
        for splits, stages in itertools.product(near if is_own else near[:1], _TRIED_STAGES[target.backend]):
            blocks = {"SPLITS": splits, "BLOCK_M": block_m, "BLOCK_N": block_n, "STAGES": stages}
            found.append(_changed(own, warps, **blocks))
    if (
        facts.can_scale_sums
        and own.blocks["BLOCK_M"] * own.blocks["BLOCK_N"] <= 32 * own.num_warps * _MOST_SUMS
    ):
        other = 1 - own.blocks["SCALE_SUMS"]
        found += [_changed(one, one.num_warps, SCALE_SUMS=other) for one in found if _is_beside(one, own)]
    return [one for one in found if one == own or _fits(target, facts, one)]


def _is_beside(config: KernelConfig, own: KernelConfig) -> bool:
    """Whether it is `own`, but for its stages."""
    return _changed(config, config.num_warps, STAGES=own.blocks["STAGES"]) == own


def _tiles(target: Target, bucket: int) -> Iterator[tuple[int, int, int]]:
    """(BLOCK_M, BLOCK_N, warps). As many rows as there are, or half of them; of many 32, 64 or 128."""
    blocks_m: Sequence[int] = (bucket,) if bucket <= 64 else (64, 128)
    fewer = max(16, min(bucket // 2, 32))
    if target.backend == "hip":  # registers of 32 threads hold fewer sums than those of 64
        blocks_m = (16,) if target.warp_size == 32 else (min(bucket, 64),)
    shapes = ((64, 4), (128, 4), (128, 8)) if target.backend == "cuda" else ((64, 4), (128, 4))
    tiles = [(block_m, *shape) for block_m, shape in itertools.product(blocks_m, shapes)]
    yield from (tile for tile in tiles if tile[0] * tile[1] <= 32 * tile[2] * _MOST_SUMS)
    if fewer not in blocks_m:
        yield fewer, 64, 4
    if bucket > 256 and target.wgmma:
        yield 256, 128, 8


def _splits_near(facts: Facts, own: KernelConfig, block_m: int, block_n: int, bucket: int) -> list[int]:
    """Those with half to twice as many programs as `own` has, the nearest first, of two units or more."""
    rows = min(bucket, 512)

    def programs(splits: int, of_rows: int, of_columns: int) -> int:
        return splits * -(-rows // of_rows) * -(-facts.shape[0] // of_columns)

    wanted = programs(own.blocks["SPLITS"], own.blocks["BLOCK_M"], own.blocks["BLOCK_N"])
    units = -(-facts.shape[1] // UNIT)
    apart = {
        splits: max(wanted / found, found / wanted)
        for splits in _TRIED_SPLITS
        if splits == 1 or units >= 2 * splits
        for found in [programs(splits, block_m, block_n)]
    }
    nearest = sorted(apart, key=lambda splits: (apart[splits], splits))
    return [splits for splits in nearest if splits == nearest[0] or apart[splits] <= 2.5]


def _changed(config: KernelConfig, warps: int, **blocks: int) -> KernelConfig:
    """With other warps and blocks."""
    merged = {**config.blocks, **blocks, "WARP_GROUPS": warps // 4}
    return KernelConfig(merged, num_warps=warps, num_stages=merged["STAGES"])


def _fits(target: Target, facts: Facts, config: KernelConfig) -> bool:
    """Whether shared memory may hold its stages; an AMD GPU's tiles pass through registers."""
    blocks = config.blocks
    unit = UNIT * (blocks["BLOCK_N"] * facts.bits // 8 + 2 * blocks["BLOCK_M"])
    return target.backend == "hip" or unit * blocks["STAGES"] <= target.shared_memory
