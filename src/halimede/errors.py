"""Every error that a user can cause, in one tree.

    HalimedeError
      ConfigError                       a setting is unknown, out of range or contradicts another
      ModelLoadError                    a checkpoint is missing, truncated, corrupt or of the wrong shape
        UnsupportedModelError           the architecture or one of its options is not implemented
        UnsupportedQuantizationError    the checkpoint's quantization is not implemented
      KernelError                       a kernel cannot be built, or does not take what it was given
        KernelCacheError                a kernel is missing from, or does not fit, the kernel cache
          CorruptKernelError            a file of the kernel cache is altered, truncated or missing
      BatchError                        a batch's input or results file cannot be used
      RequestError                      one request cannot be served; the others go on
      EngineDeadError                   the engine failed and serves nothing any more

A message carries the fact, the value and the remedy. This module imports nothing: the scheduler, the
kernels and the engine all raise from it.
"""

from collections.abc import Sequence
from typing import Any


class HalimedeError(Exception):
    """The root of every error raised on purpose."""


class ConfigError(HalimedeError, ValueError):
    """A setting is unknown, out of range or contradicts another one."""


class ModelLoadError(HalimedeError):
    """A checkpoint cannot be loaded: missing, truncated, corrupt, incomplete or of the wrong shape."""


class UnsupportedModelError(ModelLoadError):
    """The checkpoint's architecture, or an option of it, is not implemented."""


class UnsupportedQuantizationError(ModelLoadError):
    """The checkpoint is quantized in a way that is not implemented."""


class KernelError(HalimedeError):
    """A kernel cannot be built for a target, or does not take what it was given."""


class KernelCacheError(KernelError):
    """A kernel is missing from the kernel cache, or the cache was built for something else."""


class CorruptKernelError(KernelCacheError):
    """A file of the kernel cache is altered, truncated or missing. path: the file. fact: what is wrong."""

    def __init__(self, path: str, fact: str) -> None:
        super().__init__(path, fact)  # both, so that it can be pickled
        self.path = path
        self.fact = fact

    def __str__(self) -> str:
        return (
            f"{self.path} {self.fact}; build the kernel again with `halimede warmup`, or remove what is "
            "broken with `halimede kernels prune`"
        )


class BatchError(HalimedeError):
    """A batch's input or results file cannot be used: missing, of something else, in use, or full."""


class RequestError(HalimedeError, ValueError):
    """One request, or its sampling parameters, cannot be served.

    `outputs` holds what the other requests of the same call produced, in order, with None in the place
    of each request that failed; it is empty when nothing had been run.
    """

    def __init__(self, message: str, outputs: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.outputs = tuple(outputs)


class EngineDeadError(HalimedeError, RuntimeError):
    """The engine hit an error it cannot recover from; start a new one."""
