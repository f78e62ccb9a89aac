"""Which device and which data type a model runs in."""

import logging
from pathlib import Path

import torch

from halimede.engine.config import DType
from halimede.errors import ConfigError

logger = logging.getLogger(__name__)

_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_CPUINFO = Path("/proc/cpuinfo")


def resolve_device(name: str) -> torch.device:
    """The device that `name` means; "auto" is a GPU if there is one. ConfigError if it is not there."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is not a device; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ConfigError(f"device={name!r} is not supported; use auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = 0 if device.index is None else device.index
    if index >= count:
        raise ConfigError(
            f"device={name!r} is not available: torch {torch.__version__} sees {count} GPUs; "
            "use another device, check the driver, or install a torch built for this GPU"
        )
    return torch.device("cuda", index)


def resolve_dtype(
    name: DType, checkpoint: torch.dtype | None, device: torch.device, *, no_float16_for: str | None = None
) -> torch.dtype:
    """The data type that `name` means; ConfigError if the device lacks it or the model overflows in it.

    no_float16_for: the architecture, if its activations pass float16's largest number. The device "meta"
    stands for any GPU.

    "auto" on a GPU is the checkpoint's type, where that is float32 or unknown (a GGUF) bfloat16: float32
    would cost twice the memory and most of the speed. Unlike vLLM, which takes float16 there, because
    bfloat16 has float32's range and cannot overflow. A GPU without bfloat16 gets float16, and float32 where
    the model overflows in that.
    "auto" on a CPU is float32 for a float32 checkpoint, float16 for a float16 one if the CPU does not compute
    in bfloat16, and bfloat16, whose range suits every model, for all others; resolve_activation_dtype says
    what it is computed in.
    """
    has_bfloat16 = cpu_has_bfloat16() if device.type == "cpu" else _gpu_has_bfloat16(device)
    if name != "auto":
        if device.type == "cuda" and name == "bfloat16" and not has_bfloat16:
            raise ConfigError(f"dtype='bfloat16': {device} does not compute in it; use float16 or float32")
        if name == "float16" and no_float16_for is not None:
            raise ConfigError(
                f"dtype='float16': the activations of {no_float16_for} pass 65504, the largest number of "
                "float16; use bfloat16, float32 or auto"
            )
        return _DTYPES[name]
    if device.type == "cpu":
        if checkpoint == torch.float32:
            return torch.float32
        narrow = checkpoint == torch.float16 and not has_bfloat16 and no_float16_for is None
        return torch.float16 if narrow else torch.bfloat16
    if no_float16_for is not None:
        return torch.bfloat16 if has_bfloat16 else torch.float32
    if checkpoint == torch.float16:
        return torch.float16
    if not has_bfloat16:
        logger.warning("%s does not compute in bfloat16; dtype is float16, which may overflow", device)
        return torch.float16
    return torch.bfloat16


def resolve_activation_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a model whose weights and KV cache are of `dtype` computes in.

    That type, but for a CPU without arithmetic in it: emulated, it would be many times slower than float32,
    while narrow weights still make reading them, which is all that a single row waits for, twice as fast.
    """
    if device.type != "cpu" or (dtype == torch.bfloat16 and cpu_has_bfloat16()):
        return dtype
    return torch.float32


def _gpu_has_bfloat16(device: torch.device) -> bool:
    # A GPU that is not there is one of those that kernels are built for, which all have it.
    if device.type == "meta" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


def cpu_has_bfloat16(cpuinfo: Path = _CPUINFO) -> bool:
    """Whether the CPU multiplies bfloat16 natively; emulated, it is slower than float32."""
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        supported = getattr(torch.cpu, probe, None)
        if supported is not None and supported():
            return True
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    flags = {
        flag for line in text.splitlines() if line.startswith(("flags", "Features")) for flag in line.split()
    }
    return not flags.isdisjoint(("avx512_bf16", "amx_bf16", "bf16"))
