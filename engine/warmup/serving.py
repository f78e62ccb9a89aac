"""The kernels of an engine: which it needs, where they come from, loaded while the weights are."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from halimede.engine.config import EngineConfig
from halimede.engine.models.config import ModelConfig
from halimede.engine.runner.settings import ExecutionSettings
from halimede.engine.warmup.command import warmup_command
from halimede.engine.warmup.specialisations import serving_specialisations
from halimede.kernels.cache_dir import default_kernel_cache_dir
from halimede.kernels.device_kernels import DeviceKernels, device_kernels
from halimede.kernels.library import KernelLibrary, using
from halimede.kernels.specialise import Specialisation
from halimede.kernels.store import KernelStore
from halimede.kernels.target import Target
from halimede.kernels.tuning import tables_in

logger = logging.getLogger(__name__)


class ServingKernels:
    """The library of an engine and the specialisations that it needs there."""

    def __init__(self, library: KernelLibrary, specialisations: Sequence[Specialisation]) -> None:
        self.library = library
        self._specialisations = specialisations

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Launches inside take their kernels from the library, and their choices from its folder's table."""
        with using(self.library), tables_in(self.library.store.folder):
            yield

    @contextlib.contextmanager
    def loading(self, device: torch.device) -> Iterator[None]:
        """What the cache has is loaded on the device in a thread, which has ended when this ends.

        KernelError if the device does not take a kernel.
        """
        with self.loading_on(device_kernels(self.library, device)):
            yield

    @contextlib.contextmanager
    def loading_on(self, kernels: DeviceKernels) -> Iterator[None]:
        """`loading`, for a device that is not torch's."""
        failure: list[BaseException] = []

        def preload() -> None:
            try:
                self._preload(kernels)
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=preload, name="halimede-kernels", daemon=True)
        thread.start()
        try:
            yield
        finally:
            thread.join()
        if failure:
            raise failure[0]

    def _preload(self, kernels: DeviceKernels) -> None:
        start = time.monotonic()
        missing = kernels.preload(self._specialisations)
        loaded = len(self._specialisations) - len(missing)
        logger.info("%d kernels loaded from the cache in %.2f s", loaded, time.monotonic() - start)
        if missing:
            logger.info(
                "%d of %d kernels are not in the kernel cache %s and will be compiled when they are first "
                "needed; %s builds them beforehand",
                len(missing),
                len(self._specialisations),
                self.library.store.folder,
                self.library.remedy,
            )


def open_serving_kernels(
    config: EngineConfig, model_config: ModelConfig, settings: ExecutionSettings, target: Target
) -> ServingKernels:
    """What an engine needs on a target. KernelCacheError under jit="forbid" if any of it is not there."""
    folder = kernel_cache_folder(config)
    command = warmup_command(config, target.machine, folder)
    library = KernelLibrary(KernelStore(folder), config.jit, remedy=f"`{command}`")
    with tables_in(folder):
        specialisations = serving_specialisations(config, model_config, settings, target)
    library.require(specialisations)
    return ServingKernels(library, specialisations)


def kernel_cache_folder(config: EngineConfig) -> Path:
    """The configured folder, or the default one."""
    if config.kernel_cache_dir is None:
        return default_kernel_cache_dir()
    return Path(config.kernel_cache_dir).expanduser()
