"""The targets that a command line names."""

from typing import TYPE_CHECKING

from halimede.errors import KernelError

if TYPE_CHECKING:
    from halimede.kernels.target import Target


def targets_named(names: str) -> "list[Target]":
    """Of "sm_90,gfx942"; "auto": of the GPUs of this machine; "all". KernelError for an unknown one, and for
    auto where there is no GPU."""
    from halimede.kernels.target import TARGETS, find_target

    if names == "all":
        return list(TARGETS.values())
    if names != "auto":
        found = [find_target(name.strip()) for name in names.split(",") if name.strip()]
        if not found:
            raise KernelError(f"{names!r} names no target; use auto, all or some of: {', '.join(TARGETS)}")
        return list({target.machine: target for target in found}.values())
    import torch

    from halimede.kernels.target import target_of_device

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = [target_of_device(torch.device("cuda", index)) for index in range(count)]
    if not here:
        raise KernelError(
            "there is no GPU here whose target could be taken; name targets: --target sm_90,gfx942, or all. "
            f"There are: {', '.join(TARGETS)}"
        )
    return list({target.machine: target for target in here}.values())
