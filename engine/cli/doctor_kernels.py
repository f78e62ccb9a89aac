"""What `halimede doctor` finds out about the kernel cache, and whether a kernel runs."""

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

from halimede.engine.cli.machine import Findings, find_folder
from halimede.errors import HalimedeError
from halimede.kernels.cache_dir import default_kernel_cache_dir

if TYPE_CHECKING:
    from halimede.kernels.library import KernelLibrary


def find_kernels() -> Findings:
    """The cache's folder and contents; on a GPU one small kernel is run, and its result looked at."""
    found = find_folder("kernel cache", default_kernel_cache_dir(), "HALIMEDE_KERNEL_CACHE")
    found.problems.clear()  # a read-only cache is not broken: it comes with an image
    try:
        import triton  # noqa: F401
    except ImportError as error:
        found.facts["cached kernels"] = f"Triton cannot be imported ({error}); GPUs need it"
        return found
    from halimede.kernels.library import KernelLibrary
    from halimede.kernels.store import KernelStore

    store = KernelStore(default_kernel_cache_dir())
    counts = Counter((entry.triton, entry.target) for entry in store.entries())
    listed = [f"{count} for {target} (Triton {version})" for (version, target), count in counts.items()]
    found.facts["cached kernels"] = ", ".join(listed) or "none; halimede warmup builds them"
    library = KernelLibrary(store)
    import torch

    if torch.cuda.is_available():
        _try_kernel(library, found)
    found.facts |= {
        name: round(value, 3) if isinstance(value, float) else value
        for name, value in asdict(library.counters).items()
    }
    return found


def _try_kernel(library: "KernelLibrary", found: Findings) -> None:
    """Run RMSNorm on the first GPU through the cache, and compare it with torch's."""
    import torch

    from halimede.kernels.gpu.norm import rms_norm
    from halimede.kernels.library import using
    from halimede.kernels.norm import rms_norm_reference

    x = torch.randn(4, 128, device="cuda:0", dtype=torch.float16)
    weight = torch.ones(128, device="cuda:0", dtype=torch.float16)
    try:
        with using(library):
            y = rms_norm(x, weight, 1e-5)
        is_right = torch.allclose(y, rms_norm_reference(x, weight, 1e-5), atol=1e-2)
    except (HalimedeError, RuntimeError) as error:
        found.problems.append(f"a kernel cannot be run on cuda:0: {error}")
        return
    found.facts["test kernel"] = "right" if is_right else "wrong"
    if not is_right:
        found.problems.append(
            "a kernel gives wrong results on cuda:0; run halimede kernels verify, and please report it"
        )
