"""Blocks, splits, warps and stages of scaled_matmul where no table says otherwise."""

from halimede.kernels.gpu.scaled_operand import Scaling
from halimede.kernels.target import Target
from halimede.kernels.tuning import KernelConfig

ROW_BUCKETS = (16, 32, 64, 128, 256, 1 << 30)
"""Numbers of rows up to which one choice is made; the last has no end."""

_LEAST_COLUMNS = 1024  # of a split
_MOST_SPLITS = 16
_TMA_ROWS = 256  # where the tensor memory accelerator begins to pay


def config_for(
    target: Target, scaling: Scaling, bucket: int, unit: int, *, deterministic: bool
) -> KernelConfig:
    """bucket: of ROW_BUCKETS. unit: of x's stride, see aligned_strides. deterministic: sums as of few
    rows."""
    few = bucket <= 64 or deterministic
    block_m = min(bucket, 64) if few else 128
    block_n, warps = 64, 4
    if not few and target.wgmma:
        block_n, warps = 128, 8
        block_m = 256 if bucket > 256 and scaling.kind != "wide" else 128
    elif not few:
        block_m = 64
        block_n = 128 if target.backend == "hip" and target.warp_size == 64 else 64
    if target.backend == "hip" and target.warp_size == 32:
        block_m = min(block_m, 32)
    block_k = 128 if target.shared_memory > 64 << 10 or scaling.block is not None else 64
    splits = _splits(scaling, block_n, block_k, 512 if bucket <= 16 or deterministic else 264) if few else 1
    tile = block_k * (block_n + block_m * (2 if scaling.kind == "wide" else 1))
    programs = 2 if warps == 4 else 1
    most = 6 if bucket <= 16 else 4
    stages = max(2, min(most, (target.shared_memory // programs - 2048) // tile))
    if target.backend == "hip":
        stages = 2
    aligned = unit == 16 and scaling.shape[1] % 16 == 0
    tma = target.wgmma and bucket >= _TMA_ROWS and aligned and scaling.kind != "wide" and not deterministic
    blocks = {
        "SPLITS": splits,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP_M": 16,
        "PROMOTE": 1,
        "TMA": int(tma),
        "STAGES": stages,
    }
    return KernelConfig(blocks, num_warps=warps, num_stages=stages)


def _splits(scaling: Scaling, block_n: int, block_k: int, programs: int) -> int:
    tiles = -(-scaling.shape[0] // block_n)
    columns = max(1, scaling.shape[1] // _LEAST_COLUMNS)
    return max(1, min(programs // tiles, columns, _MOST_SPLITS))
