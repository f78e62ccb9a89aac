"""Facts about this machine and installation, for `halimede doctor`, and what is broken."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from halimede import __version__

_OPTIONAL = ("xformers",)
_INSTRUCTION_SETS = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "bf16", "i8mm", "sve"),  # Arm
)
_VARIABLES = (
    *("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
    *("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TRITON_CACHE_DIR", "TRITON_INTERPRET"),
    "HALIMEDE_KERNEL_CACHE",
)
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(slots=True)
class Findings:
    """Facts by name, and what is broken: the fact and the remedy in a sentence each."""

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def find_versions() -> Findings:
    """Python and the packages halimede needs or can use; a required one that is absent or unfit is broken."""
    from packaging.requirements import Requirement

    found = Findings({"halimede": __version__, "python": platform.python_version()})
    try:
        required = [Requirement(text) for text in importlib.metadata.requires("halimede") or ()]
    except importlib.metadata.PackageNotFoundError:
        found.problems.append(
            "halimede itself is not installed here, so its requirements are not known; pip install it"
        )
        required = []
    required = [r for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in required:
        version = _version(requirement.name)
        found.facts[requirement.name] = version or "not installed"
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found.problems.append(
                f"{requirement.name} is {version or 'not installed'}, and halimede needs "
                f"{requirement.specifier}; run: pip install '{requirement.name}{requirement.specifier}'"
            )
    for name in _OPTIONAL:
        found.facts[name] = _version(name) or "not installed (optional)"
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_system(cpuinfo: Path = _CPUINFO) -> Findings:
    """Operating system, CPU and memory."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        text = ""
    fields = [line.partition(":") for line in text.splitlines()]
    names = [value.strip() for key, _, value in fields if key.strip() in ("model name", "Model")]
    flags = {f for key, _, value in fields if key.strip() in ("flags", "Features") for f in value.split()}
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Findings(
        {
            "os": platform.platform(),
            "cpu": names[0] if names else platform.processor() or platform.machine(),
            "cores": f"{usable} usable of {os.cpu_count()}",
            "instruction sets": [name for name in _INSTRUCTION_SETS if name in flags] or "not known",
            "memory": format_bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        }
    )


def find_gpus() -> Findings:
    """GPUs as torch sees them, or why there is none. Imports torch."""
    import torch

    driver = _nvidia_smi("driver_version")
    if torch.cuda.is_available():
        found = Findings({"driver": driver[0] if driver else "not known"})
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            memory = f"{format_bytes(total)}, {format_bytes(free)} free"
            found.facts[f"cuda:{index}"] = f"{p.name}, {memory}, compute capability {p.major}.{p.minor}"
        return found
    found = Findings({"gpus": f"none: {_why_no_gpu(driver)}"})
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "unset") in ("", "-1")
    if driver and not hidden:
        found.problems.append(
            f"this machine has {len(driver)} NVIDIA GPUs (driver {driver[0]}) that torch "
            f"{torch.__version__} does not see; install a torch built for CUDA, or a newer driver"
        )
    return found


def _why_no_gpu(driver: list[str]) -> str:
    import torch

    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if os.environ.get(name) in ("", "-1"):
            return f"{name}={os.environ[name]!r} hides them"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for CPUs only"
    built_for = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    there = f"driver {driver[0]} is there" if driver else "no NVIDIA driver answers (nvidia-smi)"
    return f"torch {torch.__version__} is built for {built_for} and finds no device; {there}"


def _nvidia_smi(query: str) -> list[str]:
    """One value per GPU; empty where there is no NVIDIA driver."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def find_folder(name: str, folder: Path, variable: str) -> Findings:
    """A cache directory: its size, is it writable, the disk's free space. variable: what moves it."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    size = format_bytes(_size(folder)) if folder.exists() else "not there yet"
    free = format_bytes(shutil.disk_usage(existing).free)
    found = Findings({name: f"{folder} ({size}; {free} free on its disk)"})
    if not os.access(existing, os.W_OK | os.X_OK):
        found.facts[name] += ", not writable"
        found.problems.append(
            f"{folder} cannot be written; change its rights or set {variable} to another directory"
        )
    return found


def find_environment() -> Findings:
    """Variables that change where things come from, as far as they are set."""
    names = [name for known in _VARIABLES for name in (known, known.lower())]
    return Findings({name: _without_password(os.environ[name]) for name in names if name in os.environ})


def _without_password(value: str) -> str:
    """A proxy's URL may hold a user and a password."""
    parts = urlsplit(value) if "://" in value else None
    if parts is None or "@" not in parts.netloc:
        return value
    return parts._replace(netloc="***@" + parts.netloc.rpartition("@")[2]).geturl()


def _size(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_size
            except OSError:  # deleted meanwhile
                continue
    return total


def format_bytes(size: float) -> str:
    """1536 -> 1.50 KiB."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
