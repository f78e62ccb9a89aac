"""Traces of torch's profiler, between a start and a stop."""

import logging
import os
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from halimede.errors import ConfigError

logger = logging.getLogger(__name__)


class StepProfiler:
    """Records what the calling thread runs on the CPU and on `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._running: tuple[Path, profile] | None = None

    def start(self, folder: str) -> None:
        """Begin. ConfigError if a record is being made already, or the folder cannot be written to."""
        if self._running is not None:
            raise ConfigError(f"a profile is being recorded for {self._running[0]}; call stop_profile first")
        target = Path(folder).expanduser()
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"profile={folder!r}: {error}; give a folder that can be written to") from error
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        recorder = profile(activities=activities)
        recorder.start()
        self._running = target, recorder

    def stop(self) -> str:
        """End, and write the trace; its path. ConfigError if nothing is being recorded."""
        if self._running is None:
            raise ConfigError("no profile is being recorded; call start_profile first")
        (folder, recorder), self._running = self._running, None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a step may be in flight
        recorder.stop()
        moment = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns() // 1000 % 1_000_000:06}"
        path = folder / f"halimede-{moment}-{os.getpid()}.json.gz"
        recorder.export_chrome_trace(str(path))
        logger.info("profile written to %s", path)
        return str(path)
