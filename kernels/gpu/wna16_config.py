"""Blocks, splits, warps and stages of wna16_matmul where no table says otherwise.

Chosen from what an H100 did with Llama-3-8B's four shapes (docs/perf-log.md): with few rows 64 rows of the
weight a program, and K split until some 500 programs are under way, each with 8 units or more; a wide
weight takes 128 rows and no split. With more rows the batch is cut in 64, and programs need not be as many.
"""

from halimede.kernels.gpu.wna16_layout import UNIT, Facts
from halimede.kernels.target import Target
from halimede.kernels.tuning import KernelConfig

ROW_BUCKETS = (16, 32, 64, 128, 256, 512, 1 << 30)
"""Numbers of rows up to which one choice is made; the last has no end."""

_WIDE = 198  # row blocks of 128: one and a half for each processor of a large GPU
_LEAST_UNITS = 8  # of a split: fewer, and adding up costs more than it saves
_MOST_SPLITS = 16


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
    """As many units ahead as shared memory holds for the programs of a processor: 2 or 3 of 4 warps, 1 of 8."""
    if target.backend == "hip":
        return 1 if facts.has_table and target.warp_size == 32 else 2
    unit = UNIT * (block_n * facts.bits // 8 + 2 * block_m) + 16 * block_n
    programs = 1 if warps == 8 else 3 if block_m == block_n == 64 else 2
    most = 6 if block_n == 128 and block_m <= 16 else 4
    return max(2, min(most, (target.shared_memory // programs - 2048) // unit))
